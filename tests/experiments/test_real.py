"""All four stages on a folder of sets, and its scores beside BM25's: end to end, tiny."""

import json

import pytest
from test_sets import root  # noqa: F401  (a fixture)

import train
from eval import evaluate
from experiments import real

SHAPE = """
n_embd = 32
n_head = 2
n_kv_head = 1
attention_dim = 16
ffn_dim = 16
vocab_size = 400
batch_size = 2
query_len = 16
passage_len = 32
"""


@pytest.fixture
def run(root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = ""
    for stage in train.STAGES:
        (tmp_path / f"{stage}.py").write_text(
            f"stage = {stage!r}\nprevious = {before!r}\nsteps = 3\nn_negatives = 1\n"
            f"dims = {(8, 32) if stage == 'embed_sup' else ()}\n{SHAPE}")
        before = str(tmp_path / f"{stage}.py")
    train.main([before, f"--root={root}", "--out=out/real"])
    return root


def test_four_stages_and_the_table(run, tmp_path, capsys, monkeypatch):
    real.main([f"--root={run}", "--out=real.json"])
    found = json.loads((tmp_path / "real.json").read_text())
    assert found["table"].keys() == {"nanoConan", "BM25"}
    ours, lexical = found["table"]["nanoConan"], found["table"]["BM25"]
    assert ours["retrieval de-en, nDCG@10"] == 1.0         # there is one passage only,
    assert lexical["retrieval en-en, nDCG@10"] == 0.0      # and it shares no word with the question
    assert {"bitext bi, accuracy", "bitext news, accuracy", "STS sim en, Spearman"} <= ours.keys()
    assert not any("bitext" in row for row in lexical)
    assert "| retrieval, other languages to English, nDCG@10 |" in capsys.readouterr().out
    for model in ("BM25", "nanoConan"):                    # a baseline is scored once, ours again
        found["results"][model]["retrieval/qa_dev/en-en/ndcg@10"] = 0.123
    (tmp_path / "real.json").write_text(json.dumps(found))
    real.main([f"--root={run}", "--out=real.json"])
    again = json.loads((tmp_path / "real.json").read_text())["table"]
    assert again["BM25"]["retrieval en-en, nDCG@10"] == 0.123
    assert again["nanoConan"] == ours
    real.main([f"--root={run}", "--out=sts.json", "--only=sts", "--bm25=false"])
    table = json.loads((tmp_path / "sts.json").read_text())["table"]
    assert all(value is None or row.startswith("STS") for row, value in table["nanoConan"].items())
    lengths = []
    monkeypatch.setattr(real, "evaluate", lambda model, *job: (
        lengths.append(model.max_len), evaluate(model, *job))[1])
    for more in ([], ["--max_len=7"]):
        real.main([f"--root={run}", "--only=sts", "--bm25=false", *more])
    assert lengths[0] > 7 == lengths[-1]
    with pytest.raises(ValueError, match="max_len -1 must lie in 0 .. "):
        real.main([f"--root={run}", "--max_len=-1"])
    log = [json.loads(line) for line in open("out/real/embed_weak/log.jsonl")]
    assert log and all(row["task"] == "pairs" for row in log)
    assert "retrieval/qa_dev/en-en/ndcg@10" in json.loads(
        (tmp_path / "out/real/embed_sup/eval.json").read_text())


def test_the_headline_is_the_mean_of_the_foreign_directions():
    results = {f"retrieval/x/{pair}/ndcg@10": value for pair, value in
               {"all": 0.9, "en-en": 0.8, "de-en": 0.4, "zh-en": 0.2, "de-zh": 0.7}.items()}
    assert real.headline(results)["retrieval, other languages to English, nDCG@10"] == \
        pytest.approx(0.3)
