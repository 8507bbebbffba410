"""README.md: its numbers come from results/, its commands and paths exist, and it stays short."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_default_run_is_the_recorded_one():
    found = json.loads((ROOT / "results" / "default_run.json").read_text())
    name = "retrieval/installed_docs/test"
    rows = re.findall(r"^\| (BM25|pretrain|sft|embed_weak|embed_sup)(?:, first (\d+) dims)? \| "
                      r"([\d.]+) \| ([\d.]+) \| ([\d.]+) \|",
                      README.split("## The four stages")[0], re.M)
    assert {row[0] for row in rows} == {"BM25", "pretrain", "sft", "embed_weak", "embed_sup"}
    for stage, dim, *shown in rows:
        cut = f":{dim}" if dim else ""
        for metric, value in zip(("ndcg@10", "recall@1", "recall@10"), shown):
            assert value == f"{found[stage][f'{name}/{metric}{cut}']:.3f}", (stage, dim, metric)
    dims, shown = re.search(r"first ([\d, ]+) dims of stage 4 alone \(Matryoshka\): ([\d., ]+)\.",
                            README).groups()
    assert shown.split(", ") == [f"{found['embed_sup'][f'{name}/ndcg@10:{dim}']:.3f}"
                                 for dim in dims.split(", ")]
    minutes = re.search(r"([\d.]+) minutes on two cores", README).group(1)
    assert float(minutes) == round(found["minutes"], 1) <= 10
    mean = re.search(r"mean over 26 query languages: ([\d.]+) after stage 3, ([\d.]+) after",
                     README)
    for stage, value in zip(("embed_weak", "embed_sup"), mean.groups()):
        assert value == f"{found[stage]['retrieval/clr_test/mean/ndcg@10']:.3f}"
    assert f"(BM25: {found['BM25']['retrieval/clr_test/mean/ndcg@10']:.3f}," in README


def test_limits_quote_what_was_measured():
    rows = json.loads((ROOT / "results" / "bench_cpu.json").read_text())["rows"]
    section = README.split("- Speed has been measured")[1].split("\n- ")[0]
    quoted = [("training real float32", 1), ("training real bfloat16", 1),
              ("training real defaults", 1), ("encoding float32", 2), ("encoding bfloat16", 2),
              ("padded step over packed", 1), ("soft step 512", 2), ("cached time", 2)]
    assert re.findall(r"\d+\.\d+", section) == [f"{rows[name]['measured']:.{places}f}"
                                                for name, places in quoted]
    questions = json.loads((ROOT / "results" / "questions.json").read_text())
    assert f"top-10 accuracy {questions['model']['mean']:.2f} (BM25 " \
        f"{questions['bm25']['mean']:.2f})" in README


def test_real_text_shows_what_was_scored():
    table = json.loads((ROOT / "results" / "real.json").read_text())["table"]
    section = README.split("## Real text, from random weights")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (BM25|all-MiniLM-L6-v2|nanoConan) \| (.+) \|$", section, re.M)
    assert [name for name, _ in rows] == ["BM25", "all-MiniLM-L6-v2", "nanoConan"]
    for name, shown in rows:
        row = table[name]
        keys = [*(f"retrieval {lang}-en" for lang in ("ar", "de", "es", "hi", "vi", "zh")),
                "retrieval, other languages to English", "retrieval en-en"]
        assert shown.split(" | ") == [f"{row[f'{key}, nDCG@10']:.3f}" for key in keys]
    more = re.findall(r"^\| ((?:bitext|STS) .+?) \| (\S+) \| (\S+) \|$", section, re.M)
    assert len(more) > 2
    for name, *shown in more:
        assert shown == [f"{table[model][name]:.3f}" for model in ("all-MiniLM-L6-v2", "nanoConan")]


def test_results_are_those_of_the_tables():
    section = README.split("## Results: the paper")[1].split("\n## ")[0]
    recorded = "\n".join(path.read_text(encoding="utf-8") for path in
                         sorted((ROOT / "results").glob("*.md")))
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 20 and all(row in recorded for row in rows)
    numbers = re.findall(r"\d+\.\d+", section)
    assert not [number for number in numbers if number not in recorded]
    assert all(name in section for name in ("table4", "Table 6", "Table 12"))


def test_equivalences_show_the_error_that_was_measured():
    found = json.loads((ROOT / "results" / "equivalences.json").read_text())
    section = README.split("| equal | output | gradient |")[1].split("\n\n")[0]
    shown = dict(re.findall(r"^\| (.+?) \| (\S+ \| \S+) \|$", section, re.M))
    shown.pop("---", None)
    assert shown == {name: " | ".join(f"{errors[side]:.0e}" if errors[side] else "0" for side in
                                      ("output", "gradient")) for name, errors in found.items()}


def test_files_that_are_named_exist():
    for path in re.findall(r"`((?:config|tests|results|engine|experiments)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\b(?:python|train\.py|torchrun) ([\w/]+\.py)", README):
        assert (ROOT / path).is_file(), path
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        path = ROOT / f"{module}.py"
        if path.is_file() and name != "py":
            assert re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")), f"{module}.{name}"
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_it_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 350
