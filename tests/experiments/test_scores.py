"""Tables read from scores and data: groups and means by hand, counts, layout, and what is missing.

    pytest -m extras tests/test_scores.py        # the paper's task names are mteb's
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from test_sets import root  # noqa: F401  (a fixture)

import train
from clr import LANGUAGES, TABLE_7, allot, build_clr
from data import PROMPTS, Collection, task_of_step
from engine import checkpoint
from eval import TABLE_1
from experiments import columns, languages, layout, numbers, paper, scores, tables, used
from experiments.columns import LocalSet, by_column
from experiments.runs import Missing, Run
from experiments.tables import TablesConfig
from mask import FULL
from model import Conan
from tasks import LexicalBaseline
from tokenizer import Tokenizer

LANGS = ("en", "de", "zh", "km")
THEIRS = {row["Language"]: row["Conan-embedding-v2"] for row in paper.rows(paper.TABLE_13)}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def collection(folder, queries, corpus, qrels):
    write(folder / "queries.jsonl", queries)
    write(folder / "corpus.jsonl", corpus)
    (folder / "qrels.tsv").write_text("".join(f"{q}\t{d}\t1\n" for q, d in qrels))


def documents(n=12):
    return [{"id": f"lib{i % 3}.part.f{i}", "text": f"body of the word{i} and some text"}
            for i in range(n)]


@pytest.fixture
def docs(tmp_path):
    """A folder like the embedded corpus, with a dozen entries and four languages."""
    docs, found = tmp_path / "docs", documents()
    collection(docs / "test", [{**row, "text": f"find word{i} here"} for i, row in
                               enumerate(found)], found, [(row["id"],) * 2 for row in found])
    collection(docs / "clr_test", [{"id": f"{i}/{lang}", "lang": lang, "text": f"{lang} word{i}"}
                                   for i in range(3) for lang in LANGS],
               [{**row, "lang": "en"} for row in found],
               [(f"{i}/{lang}", found[i]["id"]) for i in range(3) for lang in LANGS])
    write(docs / "labelled_test.jsonl", [{"text": f"{label} text {i}", "label": label}
                                         for i in range(18) for label in ("os", "re")])
    write(docs / "clr.jsonl", [{"query": "q", "pos": ["p"], "lang": lang} for lang, n in
                               (("en", 5), ("zh", 3), ("km", 2)) for _ in range(n)])
    for kind in ("retrieval", "classification"):
        write(docs / f"{kind}.jsonl", [{"query": "q", "pos": ["p"]}] * 3)
    return docs


def save(folder, stage, docs="", **changes):
    """Write a checkpoint of random weights with all the settings that train.py writes."""
    tokenizer = Tokenizer.train(["the word of a body, some text to find here"] * 2, 290)
    folder.joinpath(stage).mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.tiktoken")
    cfg = train.TrainConfig(**{**dict(
        stage=stage, docs=str(docs), vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, n_embd=16,
        attention_dim=16, ffn_dim=16, block_size=64, query_len=32, passage_len=32, steps=40,
        dims=(8, 16) if stage == "embed_sup" else ()), **changes})
    model = Conan(cfg.model_config()).init_weights(torch.Generator().manual_seed(len(stage)))
    checkpoint.save(folder / stage, 40, {
        "model.pt": model.state_dict(), "config.json": json.dumps({
            "model": dataclasses.asdict(cfg.model_config()), "train": dataclasses.asdict(cfg),
            "mask": dataclasses.asdict(FULL), "passage_len": 32, "step": 40, "prompts": PROMPTS}),
        "tokenizer.tiktoken": (folder / "tokenizer.tiktoken").read_bytes()})
    return model.count_params()


@pytest.fixture
def out(docs, tmp_path, monkeypatch):
    """A run on it: both embedding stages."""
    monkeypatch.chdir(tmp_path)
    for stage in ("embed_weak", "embed_sup"):
        save(tmp_path / "run", stage, docs)
    return tmp_path / "run"


@pytest.fixture
def make(out, tmp_path):
    """Return the JSON of a table, made on the command line."""
    def run(name, *flags):
        tables.main([name, f"--out={out}", f"--results={tmp_path / 'results'}", *flags])
        return json.loads((tmp_path / "results" / f"{name}.json").read_text())
    return run


class FewWords:
    """Embed by which of some words occur, weighted: the oracle of a test, or one that is blind."""

    def __init__(self, weights):
        self.weights = weights

    def encode(self, texts, prompt=None, truncate_dim=None, **_):
        words = list(self.weights)
        found = np.array([[self.weights[w] * bool(re.search(rf"\b{w}\b", text)) for w in words]
                          for text in texts], dtype=np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


# ---------------------------------------------------------------- the paper's own numbers

def test_the_papers_tables_have_the_rows_that_it_printed():
    counts = {name: len(paper.rows(table) if isinstance(table, str) else table)
              for name, table in vars(paper).items() if name.startswith("TABLE_")}
    assert {name: counts.pop(name) for name in ("TABLE_4", "TABLE_6", "TABLE_12")} == {
        "TABLE_4": 6, "TABLE_6": 8, "TABLE_12": 3}
    assert counts == {"TABLE_1": 15, "TABLE_2": 11, "TABLE_3": 6, "TABLE_5": 6, "TABLE_8": 3,
                      "TABLE_9": 7, "TABLE_10": 7, "TABLE_11": 4, "TABLE_13": 26, "TABLE_14": 56,
                      "TABLE_15": 35}
    assert list(paper.rows(paper.TABLE_1)[0])[2:] == list(TABLE_1)
    assert paper.rows(paper.TABLE_1)[7]["Summ."] is None
    assert paper.rows(paper.TABLE_5)[5] == {
        "Model": "Conan-embedding-v2", "Model Size (million)": 1503, "Embedding Dim.": 3584,
        "Infer Time (min.)": 5.14, "MRL": True, "Avg.": 73.52}
    languages = [value for lang, value in THEIRS.items() if lang != "Avg"]
    assert len(languages) == 25 and np.mean(languages) == pytest.approx(THEIRS["Avg"], abs=0.05)


@pytest.mark.extras
def test_tasks_have_mtebs_names_and_columns():
    mteb = pytest.importorskip("mteb")
    here, known = ({}, {}), ({}, {})
    for i, (lang, printed) in enumerate((("en", paper.TABLE_14), ("zh", paper.TABLE_15))):
        here[i].update({row["Task"]: TABLE_1[row["Column"]] for row in paper.rows(printed)})
        known[i].update({task.metadata.name: task.metadata.type
                         for task in mteb.get_benchmark(scores.BENCHMARKS[lang]).tasks})
    assert here[0] == known[0]
    more = here[1].items() - known[1].items()          # four tasks of many languages, Chinese too
    assert len(known[1]) == 31 and known[1].items() < here[1].items()
    assert len(more) == 4 and more < known[0].items()


# ---------------------------------------------------------------- groups of languages

@pytest.mark.parametrize("groups", [languages.LEVELS, languages.FAMILIES])
def test_every_language_of_table_7_has_one_group(groups):
    members = [lang for group in groups.values() for lang in group]
    assert sorted(members) == sorted(TABLE_7) == sorted(LANGUAGES)


def test_the_groups_are_the_papers_as_far_as_its_own_tables_agree():
    assert list(languages.LEVELS) == [row["Resource"] for row in paper.rows(paper.TABLE_8)]
    assert list(languages.FAMILIES) == [row["Language Family"] for row in paper.rows(paper.TABLE_9)]
    levels = languages.grouped(languages.LEVELS, THEIRS)
    assert levels["High-resource"] == pytest.approx(70.6, abs=0.05)
    assert levels["Mid-resource"] == pytest.approx(73.47, abs=0.005)
    assert levels["Low-resource"] == pytest.approx(72.25, abs=0.005)      # the paper prints 72.19
    families = languages.grouped(languages.FAMILIES, THEIRS)
    printed = {row["Language Family"]: row["Avg. Score"] for row in paper.rows(paper.TABLE_9)}
    for name in ("Germanic", "Romance", "Slavic", "Arabic", "Korean"):
        assert families[name] == pytest.approx(printed[name], abs=0.051), name
    rare = np.mean([THEIRS[lang] for lang in ("fi", "he", "hu", "km")])
    assert printed["Others"] == pytest.approx(rare, abs=0.05)             # of nine languages, four


def test_groups_are_means_over_the_languages_that_are_there():
    groups = {"a": ("x", "zh"), "b": ("y",), "c": ("z",)}
    values = {"x": 1.0, "zh_cn": 2.0, "zh_tw": 6.0, "y": 5.0, "en": 9.0}
    assert languages.grouped(groups, values) == {"a": 3.0, "b": 5.0, "c": None}
    assert languages.shares({"x": 1, "y": 3}) == {"x": 25.0, "y": 75.0}


def test_what_clr_makes_has_the_shares_of_table_7(out, docs):
    rows = [{"query": "a", "pos": ["p"]} for _ in range(1060)]            # the shares' sum is 106
    write(docs / "clr.jsonl", build_clr(rows, lambda text, lang: text))
    assert languages.clr_languages(Run(out)) == {lang: 10 * n for lang, n in TABLE_7.items()}
    some = languages.shares({lang: allot(997).count(lang) for lang in TABLE_7})
    wanted = languages.shares(TABLE_7)
    assert all(abs(some[lang] - wanted[lang]) <= 100 / 997 for lang in TABLE_7)


# ---------------------------------------------------------------- local sets and their means

def test_columns_are_means_over_sets_and_the_average_is_over_all():
    def item(column):
        return LocalSet(column, "x", [])
    found = by_column([(item("Class."), 50.0), (item("Class."), 100.0), (item("STS"), 9.0)])
    assert found["Class."] == 75.0 and found["STS"] == 9.0 and found["Summ."] is None
    assert found["Avg."] == pytest.approx(53.0)                           # not (75 + 9) / 2
    assert list(found) == list(TABLE_1) and list(columns.METRICS) == list(TABLE_1)[:-1]
    lacking = by_column([(item("Class."), None), (item("STS"), 9.0)])
    assert lacking["Class."] is None and lacking["Avg."] is None and lacking["STS"] == 9.0


def test_half_of_each_label_is_to_fit_from_and_rare_labels_are_out():
    rows = [{"text": f"{label}{i}", "label": label} for label, n in (("a", 17), ("b", 15))
            for i in range(n)]
    made = columns.halves(rows)
    assert {row["label"] for row in made} == {"a"} and columns.LEAST == 16
    assert [row["split"] for row in made[:3]] == ["train", "test", "train"]
    assert [row["split"] for row in made].count("train") == 9


def test_pairs_and_candidates_are_made_of_a_collection():
    found = [{"id": name, "text": f"{name} text"} for name in ("c", "a", "b")]
    whole = Collection("x", found, [{**row, "text": f"{row['id']}?"} for row in found],
                       {row["id"]: {row["id"]: 1} for row in found})
    assert columns.neighbours(whole)[:2] == [
        {"sentence1": "a?", "sentence2": "a text", "label": 1},
        {"sentence1": "a?", "sentence2": "b text", "label": 0}]
    assert sorted(pair["label"] for pair in columns.neighbours(whole)) == [0, 0, 0, 1, 1, 1]
    rows = columns.candidates(whole)
    assert rows[0]["query"] == "c?" and rows[0]["pos"] == ["c text"]
    assert sorted(rows[0]["neg"]) == ["a text", "b text"]


def test_the_embedded_corpus_fills_six_columns(docs):
    found = {item.column: item.data for item in columns.of_corpus(docs, "en")}
    assert list(found) == ["Class.", "Clust.", "PairClass", "Rerank", "Retri", "STS"]
    assert 0 < len(found["STS"]) <= 1000 and len(found["Class."]) == 36
    (zh,) = columns.of_corpus(docs, "zh")
    assert zh.column == "Retri" and {row["lang"] for row in zh.data.queries} == {"zh"}


def test_a_folder_gives_held_out_rows_of_one_language(root):  # noqa: F811
    write(root / "para" / "data.jsonl", [
        {"id": f"p{i}", "sentence1": "a", "sentence2": "b", "label": i % 2, "lang": "en",
         "split": "train"} for i in range(40)])
    found = {(item.column, item.name): item.data for item in columns.of_folder(root, "en")}
    assert found.keys() == {
        ("Retri", "qa"), ("Rerank", "qa"), ("Retri", "qa_dev"), ("Rerank", "qa_dev"),
        ("STS", "sim"), ("Class.", "topics"), ("Clust.", "topics"), ("PairClass", "para")}
    assert [row["id"] for row in found["Retri", "qa"].queries] == ["en/2"]       # split dev
    assert [row["id"] for row in found["Retri", "qa_dev"].queries] == ["en/1"]   # English only
    assert {row["split"] for row in found["STS", "sim"]} == {"dev"}
    assert {row["split"] for row in found["Clust.", "topics"]} == {"test"}
    assert {row["split"] for row in found["Class.", "topics"]} == {"train", "test"}
    assert all(columns.sets.is_held_out(row["id"]) for row in found["PairClass", "para"])
    assert {(item.column, item.name) for item in columns.of_folder(root, "ja")} == {("STS", "sim")}


def test_a_score_is_computed_once_for_a_model_and_its_data(tmp_path):
    kept, asked = columns.Kept(tmp_path / "a" / "scores.json"), []

    def compute():
        asked.append(1)
        return 0.5
    for data in ([{"a": 1}], [{"a": 1}], [{"a": 2}]):
        assert kept.get("m", "STS", data, compute) == 0.5
    kept.get("other", "STS", [{"a": 1}], compute)
    assert len(asked) == 3
    again = columns.Kept(tmp_path / "a" / "scores.json")                 # another command
    assert again.get("m", "STS", [{"a": 2}], lambda: 0.9) == 0.5
    item = LocalSet("Class.", "x", [])
    assert columns.score(LexicalBaseline(), item, kept, "BM25") is None


# ---------------------------------------------------------------- the tables

def rows_of(found, **wanted):
    return [row for row in found["rows"] if wanted.items() <= row.items()]


def test_table_1_has_the_papers_rows_ours_and_mtebs(make, out):
    (out / "embed_sup" / "eval.json").write_text(json.dumps(
        {"mteb/MTEB(eng, v1)/Classification/mean": 0.5, "mteb/MTEB(eng, v1)/tasks/mean": 0.25}))
    found = make("table1")
    assert len(rows_of(found, Source="paper")) == 15
    (mteb,) = rows_of(found, Source="mteb")
    assert (mteb["Languages"], mteb["Class."], mteb["Avg."]) == ("English", 50.0, 25.0)
    (ours,) = rows_of(found, Source="local sets", Model="nanoConan", Languages="English")
    values = [ours[c] for c in ("Class.", "Clust.", "PairClass", "Rerank", "Retri", "STS")]
    assert ours["Summ."] is None and ours["Avg."] == pytest.approx(np.mean(values))
    (lexical,) = rows_of(found, Model="BM25", Languages="English")
    assert lexical["Retri"] == 100.0 and lexical["Class."] is None and lexical["Avg."] is None
    (zh,) = rows_of(found, Model="nanoConan", Languages="Chinese")
    assert zh["Retri"] == zh["Avg."] is not None and zh["STS"] is None
    assert any('--mteb="MTEB(cmn, v1)"' in note for note in found["notes"])
    assert any("--summarization=FILE" in note for note in found["notes"])


def test_table_2_needs_a_second_run_and_says_how_to_make_it(make, out, docs, tmp_path):
    with pytest.raises(Missing, match=r"cp -r \S+run/tokenizer.tiktoken .* --task_weights="):
        make("table2", f"--zero_shot={tmp_path / 'zero'}")
    save(tmp_path / "zero", "embed_sup", docs, task_weights={"retrieval": 2.0, "clr": 3.0})
    found = make("table2", f"--zero_shot={tmp_path / 'zero'}")
    (all_of,), (zero,) = (rows_of(found, Source="local sets", Model=name)
                          for name in ("nanoConan", "nanoConan, zero-shot"))
    assert zero["Zero-shot"] == "50%"              # Class., Clust. and STS of six
    assert all_of["Zero-shot"] == "17%"            # there is no sts.jsonl: STS
    assert not any(row["Zero-shot"] for row in rows_of(found, Model="BM25"))


def test_a_set_outside_of_the_runs_folder_is_unseen(out, root):  # noqa: F811
    save(out.parent / "real", "embed_sup", root=str(root), retrieval=("r.jsonl",))
    items = [LocalSet("Retri", name, None) for name in ("qa", "qa_dev", "elsewhere")]
    assert scores.unseen(Run(out.parent / "real"), items) == "67%"       # qa_dev is never trained


def test_mkqa_is_the_mean_over_foreign_languages(make, docs):
    three, thirteen = make("table3"), make("table13")
    lexical = next(row for row in three["rows"] if row["Model"] == "BM25" and
                   row["Source"] == "clr_test")
    assert lexical["R@20"] == lexical["R@100"] == lexical["nDCG@10"] == 100.0
    by_language = {row["Language"]: row for row in thirteen["rows"]}
    column = "nanoConan, stage 4, clr_test"
    own = [by_language[lang][column] for lang in ("de", "zh", "km")]
    assert by_language["mean"][column] == pytest.approx(np.mean(own))
    assert by_language["en"][column] is not None and by_language["fr"][column] is None
    assert by_language["zh"]["Conan-embedding-v2, MKQA"] == 70.4         # zh_cn
    assert "bn" not in by_language and len(by_language) == 25 + 1 + 1    # en, mean
    assert {"nanoConan, stage 3", "nanoConan, stage 4"} <= {row["Model"] for row in three["rows"]}
    with pytest.raises(Missing, match="--collection=FOLDER"):
        make("table3", f"--root={docs.parent}")
    again = make("table3", f"--root={docs.parent}", f"--collection={docs / 'clr_test'}")
    assert [r for r in again["rows"] if r["Source"] == "clr_test"] == [
        r for r in three["rows"] if r["Source"] == "clr_test"]
    assert f"--collection={docs / 'clr_test'}" in again["command"]


def test_tables_7_8_9_count_the_rows_that_were_trained_on(make, docs):
    rows = {row["Language"]: row for row in make("table7")["rows"]}
    assert rows["English"]["rows here"] == 5 and rows["Chinese"]["share here"] == 30.0
    assert rows["French"]["rows here"] == 0 and rows["French"]["of 106"] == pytest.approx(600 / 106)
    eight = {row["Resource"]: row for row in make("table8")["rows"]}
    assert [row["rows here"] for row in eight.values()] == [80.0, 0.0, 20.0]
    nine = {row["Language Family"]: row for row in make("table9")["rows"]}
    assert nine["Germanic"]["rows here"] == 50.0 and nine["Others"]["rows here"] == 20.0
    assert nine["Others"]["Total Share, paper"] == "11%"
    by_language = {row["Language"]: row["nanoConan, stage 4, clr_test"]
                   for row in make("table13")["rows"]}
    column = "nanoConan, stage 4, clr_test"
    assert nine["Germanic"][column] == by_language["de"]                 # English does not count
    assert eight["High-resource"][column] == by_language["zh"]
    assert nine["Korean"][column] is None
    (docs / "clr.jsonl").unlink()
    with pytest.raises(Missing, match="without CLR rows"):
        make("table7")


def test_table_5_measures_ours_and_leaves_bm25_empty(make, out):
    rows = {row["Model"]: row for row in make("table5")["rows"] if row["Source"] == "here"}
    ours, lexical = rows["nanoConan"], rows["BM25"]
    assert ours["Model Size (million)"] == round(Run(out).parameters("embed_sup") / 1e6, 1)
    assert ours["Embedding Dim."] == 16 and ours["MRL"] is True and ours["Infer Time (s)"] > 0
    assert lexical["Embedding Dim."] is None and lexical["Infer Time (s)"] is None
    assert lexical["Retri"] == 100.0 and lexical["Avg."] is None


def test_tables_14_and_15_stand_beside_every_task(make, out):
    (out / "embed_sup" / "eval.json").write_text(json.dumps({
        "mteb/ArguAna/test/ndcg_at_10": 0.3, "mteb/ArguAna/test/ndcg_at_10:8": 0.1,
        "mteb/MassiveIntentClassification/zh-CN/accuracy": 0.4,
        "mteb/MassiveIntentClassification/en/accuracy": 0.6,
        "mteb/STS22/zh/spearman": 0.7, "mteb/STS22/zh-en/spearman": 0.8}))
    english = {row["Task"]: row for row in make("table14")["rows"]}
    chinese = {row["Task"]: row for row in make("table15")["rows"]}
    assert english["ArguAna"]["nanoConan"] == 30.0 and english["FEVER"]["nanoConan"] is None
    assert english["MassiveIntentClassification"]["nanoConan"] == 60.0
    assert chinese["MassiveIntentClassification"]["nanoConan"] == 40.0
    assert chinese["STS22"]["nanoConan"] == 70.0 and english["STS22"]["nanoConan"] is None
    assert english["all 56"]["nanoConan"] is None                        # not all have been run
    assert english["all 56"]["Conan-embedding-v2"] == 73.09
    assert english["all 6"]["nanoConan"] is not None


def test_a_table_without_a_run_names_the_command(make, out):
    with pytest.raises(Missing, match="python train.py config/embed_sup.py --out="):
        tables.main(["table1", f"--out={out}/none"])


# ---------------------------------------------------------------- counting

@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stages 3 and 4, twelve steps each on files made by hand, a log line for every step."""
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "neg": ["n"]} for i in range(30)]
    files = {name: write(tmp_path / f"{name}.jsonl", rows[:n]) for name, n in
             (("a", 30), ("b", 10), ("clr", 8), ("retrieval", 20))}
    files["sts"] = write(tmp_path / "sts.jsonl", [
        {"sentence1": f"s {i}", "sentence2": "t", "score": i} for i in range(6)])
    shape = ["--vocab_size=300", "--n_embd=16", "--n_head=2", "--n_kv_head=1", "--attention_dim=16",
             "--ffn_dim=16", "--steps=12", "--batch_size=2", "--log_every=1", "--n_negatives=1"]
    train.main(["--stage=embed_weak", f"--pairs={files['a']},{files['b']}", *shape])
    train.main(["--stage=embed_sup", f"--retrieval={files['retrieval']}", f"--sts={files['sts']}",
                f"--clr={files['clr']}", "--batch_sizes=sts:3", *shape])
    return Run("out")


def test_what_was_drawn_is_what_the_log_says(trained):
    log = [row["task"] for row in trained.log("embed_sup")]
    found = {kind: rest for kind, *rest in used.drawn(trained, "embed_sup")}
    assert {kind: steps for kind, (_, _, steps, _) in found.items()} == {
        kind: log.count(kind) for kind in ("retrieval", "clr", "sts")}
    assert {kind: n for kind, (_, n, _, _) in found.items()} == {
        "retrieval": 20, "clr": 8, "sts": 6}
    for kind, (_, _, steps, examples) in found.items():
        assert examples == steps * (3 if kind == "sts" else 2)


def test_pairs_are_drawn_by_the_rows_of_their_files(trained, tmp_path):
    found = used.drawn(trained, "embed_weak")
    times = np.bincount(task_of_step(np.arange(12), [30, 10], 0), minlength=2).tolist()
    assert [(n, steps, examples) for _, _, n, steps, examples in found] == [
        (30, times[0], 2 * times[0]), (10, times[1], 2 * times[1])]
    assert sum(times) == 12 and times[0] > times[1]


def test_table_11_lists_tasks_and_adds_them_up(trained, tmp_path):
    tables.main(["table11", f"--results={tmp_path}"])
    found = json.loads((tmp_path / "table11.json").read_text())
    rows = {row["Tasks"]: row for row in found["rows"]}
    assert rows["classification"]["Rows"] is None                        # the run had none
    assert rows["STS"]["Numbers, paper"] == "1.8M" and rows["STS"]["Rows"] == 6
    assert rows["STS"]["Epochs"] == pytest.approx(rows["STS"]["Drawn"] / 6)
    assert rows["all"]["Steps"] == 12 and rows["all"]["Rows"] == 34
    assert rows["all"]["Tokens"] == trained.log("embed_sup")[-1]["tokens"] > 0


def test_table_10_has_a_line_for_each_stage_and_file(trained, tmp_path):
    with pytest.raises(Missing, match="pretrain"):
        tables.main(["table10", f"--results={tmp_path}"])
    text = write(tmp_path / "text.jsonl", [{"text": "a text"}] * 5)
    for stage, files in (("pretrain", {"text": (text,)}), ("sft", {"pairs": (text,)})):
        save(tmp_path / "out" / "other", stage, **files)
        (tmp_path / "out" / "other" / stage).rename(tmp_path / "out" / stage)
        write(tmp_path / "out" / stage / "log.jsonl", [{"step": 40, "tokens": 99}])
    (tmp_path / "text.jsonl").write_text(
        '{"text": "a text", "input": "a", "output": "b"}\n' * 5)
    tables.main(["table10", f"--results={tmp_path}"])
    rows = json.loads((tmp_path / "table10.json").read_text())["rows"]
    own = [(row["Source"], row["Categories"], row.get("Numbers"), row.get("Tokens"))
           for row in rows if row["Source"] != "paper"]
    assert own[:2] == [("pretrain", "text", 5, 99), ("sft", "text", 5, 99)]
    assert [row[:3] for row in own[2:]] == [
        ("embed_weak", "a", 30), ("embed_weak", "b", 10), ("embed_weak", "all", 40)]
    assert rows[-1]["Steps"] == 12 and rows[-1]["Drawn"] == 24


# ---------------------------------------------------------------- the probe of numbers

def test_the_probe_is_balanced():
    for name, found in list(numbers.groups().items())[:3]:
        assert len(found) == len(set(found)) == 10 * 8 * 7, name
        right = sorted(passage for _, passage, _ in found)
        assert right == sorted(passage for _, _, passage in found)       # each right, and wrong
        queries = [query.split(" ")[0] for query, _, _ in found]
        assert len({queries.count(word) for word in queries}) == 1


def test_an_oracle_answers_everything():
    subjects = {subject: 2.0 for subject in numbers.SUBJECTS}
    digits = FewWords({**subjects, **dict.fromkeys(numbers.DIGITS, 1.0)})
    assert numbers.accuracy(digits, numbers.groups()["3 for 3"]) == 1.0
    assert numbers.accuracy(digits, numbers.groups()["subject before number"]) == 1.0
    words = FewWords({**subjects, **dict.fromkeys(numbers.WORDS, 1.0)})
    assert numbers.accuracy(words, numbers.groups()["three for three"]) == 1.0
    assert numbers.accuracy(words, numbers.groups()["3 for three"]) == 0.5   # "3" says nothing


def test_who_sees_no_digits_or_likes_large_ones_is_at_chance():
    blind = FewWords({word: 1.0 for subject in numbers.SUBJECTS for word in subject.split()})
    large = FewWords({"fairy": 1.0, **{digit: 0.1 * int(digit) for digit in "89"}, "of": 0.3})
    groups = numbers.groups()
    assert [numbers.accuracy(blind, groups[name]) for name in list(groups)[:3]] == [0.5] * 3
    assert numbers.accuracy(blind, groups["subject before number"]) == 1.0
    asked_nothing = [(query.split(" ", 1)[1], a, b) for query, a, b in groups["3 for 3"]]
    assert numbers.accuracy(large, asked_nothing) == 0.5
    assert numbers.accuracy(LexicalBaseline(), groups["3 for 3"]) == 1.0     # an equal word


def test_appendix_b_scores_every_stage_there_is(make):
    found = make("appendix_b")
    assert [row["Model"] for row in found["rows"]] == [
        "BM25", "nanoConan, stage 3", "nanoConan, stage 4"]
    assert found["rows"][0]["3 for 3"] == 100.0
    assert all(0 <= row[name] <= 100 for row in found["rows"] for name in numbers.groups())


# ---------------------------------------------------------------- layout

def test_a_table_is_written_as_markdown_and_json(tmp_path):
    rows = [{"Model": "a | b", "n": 1503, "x": None, "MRL": True}, {"Model": "c", "x": 0.5}]
    assert layout.markdown(rows).split("\n") == [
        "| Model | n | x | MRL |", "| --- | --: | --: | --: |", "| a \\| b | 1,503 |  | ✓ |",
        "| c |  | 0.50 |  |"]
    assert layout.cell((70.44, 0.25), 1) == "70.4 ± 0.2" and layout.cell(False) == "✗"
    cfg = TablesConfig(results=str(tmp_path / "r"), sentence_transformer=("x", "y"))
    found, text = layout.write(cfg, "t", "Table 0", rows, ["A note."], seeds=[1])
    command = (f"python -m experiments.tables t --results={tmp_path / 'r'} "
               "--sentence_transformer=x,y")
    assert json.loads(found.read_text()) == {"title": "Table 0", "command": command, "rows": rows,
                                             "notes": ["A note."], "seeds": [1]}
    lines = text.read_text().split("\n")
    assert lines[0] == "**Table 0**" and lines[-3:] == ["- A note.", f"- Made by `{command}`.", ""]
    assert layout.command("figures", TablesConfig()) == "python -m experiments.tables figures"
    assert layout.read(tmp_path / "none.json") == {}


def test_every_table_has_its_command():
    made = {scores: (1, 2, 5, 14, 15), languages: (3, 7, 8, 9, 13), used: (10, 11)}
    for module, numbers_ in made.items():
        for n in numbers_:
            assert callable(getattr(module, f"table{n}")) and f"table{n}" in tables.COMMANDS
    assert "appendix_b" in tables.COMMANDS
