"""One tiny data folder, a recipe for it, and a finished run of all four stages."""
import contextlib
import io
import random
from types import SimpleNamespace

import pytest

import train
from engine.jsonl import write_jsonl

WORDS = "sort list tree graph node edge file read write matrix vector random time".split()
SHAPE = """vocab_size = 400
n_layer = 1
n_embd = 32
n_head = 4
n_kv_head = 2
ffn_dim = 48
query_len = 16
passage_len = 40
block_size = 256
device = "cpu"
dtype = "float32"
learning_rate = 1e-3
log_every = 1
"""
STAGES = {"pretrain": "steps = 4\nbatch_size = 4\nwarmup = 0.5\nfinal_lr = 1.0\n",
          "sft": "steps = 2\nbatch_size = 4\n", "embed_weak": "steps = 5\nbatch_size = 8\n",
          "embed_sup": "steps = 12\nbatch_size = 8\nn_negatives = 2\npool_size = 6\n"
                       "dims = (8, 32)\n"}


def write_collection(folder, corpus, queries, qrels):
    """Write corpus.jsonl, queries.jsonl and qrels.tsv. qrels: {query: document}."""
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels.tsv").write_text("".join(f"{q}\t{d}\t1\n" for q, d in qrels.items()))


def write_data(folder):
    """Write a data folder in train.py's layout, of words that the lexicon knows."""
    rng, rows = random.Random(0), []
    for i in range(100):
        a, b, c = rng.sample(WORDS, 3)
        rest = " ".join(f"Line {k} says that the {rng.choice(WORDS)} of the {a} is a "
                        f"{rng.choice(WORDS)}." for k in range(40))
        rows.append((f"Convert {a} to {b} with {c}", f"It can {a} a {b}, number {i}. {rest}"))
    write_jsonl(folder / "text.jsonl", ({"text": f"{q}. {p}"} for q, p in rows[:60]))
    write_jsonl(folder / "text_dev.jsonl", ({"text": f"{q}. {p}"} for q, p in rows[60:80]))
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs" / "docs.jsonl", ({"input": q, "output": p} for q, p in rows[:60]))
    write_jsonl(folder / "retrieval.jsonl", ({"query": q, "pos": [p]} for q, p in rows[:60]))
    write_jsonl(folder / "clr.jsonl", ({"query": f"xx {q}", "pos": [p], "lang": "de"}
                                       for q, p in rows[:60]))
    write_jsonl(folder / "sts_test.jsonl", ({"sentence1": q, "sentence2": rows[i // 2][0],
                                             "score": i % 3} for i, (q, _) in enumerate(rows)))
    for split, part in (("dev", rows[60:80]), ("test", rows[80:])):
        names = [f"lib.f{i}" for i in range(20)]
        write_collection(folder / split,
                         [{"id": n, "text": p} for n, (_, p) in zip(names, part)],
                         [{"id": n, "text": q} for n, (q, _) in zip(names, part)],
                         {n: n for n in names})
        queries = [{"id": f"{i}/{lang}", "lang": lang, "text": f"{lang} {part[i][0]}"}
                   for i in range(6) for lang in ("en", "de", "zh", "ja")]
        write_collection(folder / f"clr_{split}",
                         [{"id": str(i), "lang": "en", "text": part[i][1]} for i in range(6)],
                         queries, {row["id"]: row["id"].split("/")[0] for row in queries})


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Folders of a tiny world: .data, .config, and .out of a finished run of all four stages."""
    folder = tmp_path_factory.mktemp("home")
    data, config, previous = folder / "data", folder / "config", ""
    data.mkdir()
    config.mkdir()
    write_data(data)
    for stage, settings in STAGES.items():
        (config / f"{stage}.py").write_text(
            f"stage = {stage!r}\nprevious = {previous!r}\n{SHAPE}{settings}")
        previous = str(config / f"{stage}.py")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")           # else train.py takes every core
        train.main([previous, f"--data={data}", f"--out={folder / 'out'}"])
    return SimpleNamespace(data=data, config=config, out=folder / "out")
