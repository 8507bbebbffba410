"""Public sets: what is scored, the headline, and the table of a tiny folder."""
import json
import shutil

import pytest

from engine.jsonl import write_jsonl
from experiments import real


@pytest.fixture
def root(home, tmp_path):
    """A folder of sets: one collection for evaluation, and sentences with scores."""
    root = tmp_path / "root"
    shutil.copytree(home.data / "clr_test", root / "qa_dev")
    (root / "sim").mkdir()
    write_jsonl(root / "sim" / "data.jsonl", [
        {"sentence1": "sort", "sentence2": word, "score": i, "lang": "en", "split": split}
        for split in ("train", "dev") for i, word in enumerate(("a list", "read", "tree"))])
    return root


def test_the_headline_is_the_mean_of_the_foreign_directions():
    scores = {f"retrieval/x/{pair}/ndcg@10": value for pair, value in
              {"all": 0.9, "en-en": 0.8, "de-en": 0.4, "zh-en": 0.2, "de-zh": 0.7}.items()}
    scores["sts/sim/en/spearman"] = 0.5
    rows = real.headline(scores)
    assert rows["retrieval, other languages -> English, nDCG@10"] == pytest.approx(0.3)
    assert rows["sts sim en, spearman"] == 0.5 and len(rows) == 5


def test_every_model_is_scored_on_every_set_and_baselines_once(home, root, tmp_path):
    flags = [f"--root={root}", f"--data={home.data}", f"--checkpoint={home.out / 'embed_sup'}",
             "--bags=false", f"--results={tmp_path}"]
    table = json.loads(real.main(flags).read_text())
    assert table["scores"].keys() == {"nanoConan", "BM25"}
    rows = {row[""]: row for row in table["tables"][""]}
    assert rows["retrieval de-en, nDCG@10"].keys() == {"", "nanoConan", "BM25"}
    assert rows["sts sim en, spearman"]["BM25"] is None
    for own in table["scores"].values():               # a baseline is scored once, ours again
        own["retrieval/qa_dev/en-en/ndcg@10"] = 0.123
    (tmp_path / "real.json").write_text(json.dumps(table))
    again = json.loads(real.main(flags).read_text())["scores"]
    assert again["BM25"]["retrieval/qa_dev/en-en/ndcg@10"] == 0.123
    assert again["nanoConan"]["retrieval/qa_dev/en-en/ndcg@10"] != 0.123
    with pytest.raises(ValueError, match="max_len -1 must lie in 0 .. 256"):
        real.main([*flags, "--max_len=-1"])
    with pytest.raises(ValueError, match="no set to score"):
        real.main([*flags, "--only=clustering"])
