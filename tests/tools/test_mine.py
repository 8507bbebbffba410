"""tools.mine: the pools of training, on any ranks, after a kill; stage 4 takes them as they are."""
import json

import numpy as np
import pytest

import data
import train
from embed import Embedder
from engine import mining
from engine.bm25 import BM25
from engine.distributed import ALONE
from engine.jsonl import read_jsonl
from ranks import arguments, config, on_ranks, write_lines
from tools import mine


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """Return the folder of a run of stage 3, on the rows in the current folder."""
    out = tmp_path_factory.mktemp("run")
    train.main(arguments(rows, "embed_weak", out))
    return out


def mined(run, source, out, *more):
    mine.main([f"--checkpoint={run / 'embed_weak'}", f"--input={source}", f"--out={out}",
               "--device=cpu", "--depth=6", "--n_negatives=3", *more])
    return list(read_jsonl(out))


def pools_of(rows, run, kind, source, n=3):
    """Return the texts of the pools that stage 4 fills from a file, without the floor at 0.4."""
    cfg = config(arguments(rows, "embed_sup", run / "out", f"--{kind}={source}"))
    embedder = Embedder(run / "embed_weak", "cpu")
    task = data.Task(kind, cfg, embedder.tokenizer, ALONE, [source])
    real, data.without_easy = data.without_easy, lambda pool, scores, n: pool
    try:
        data.fill_pools([task], embedder)
    finally:
        data.without_easy = real
    return [[task.passages.text(p) for p in row.tolist() if p >= 0]
            for row in task.pool.candidates]


@pytest.mark.parametrize("kind", ["retrieval", "clr", "classification"])
def test_a_mined_file_has_the_pools_of_training(rows, run, tmp_path, kind):
    source = write_lines(tmp_path / "rows.jsonl", [
        {"id": i, "query": row["query"], "pos": row["pos"], "neg": row["neg"][:i % 3]}
        for i, row in enumerate(read_jsonl(rows / "retrieval.jsonl"))])
    out = mined(run, source, tmp_path / "mined.jsonl", f"--task={kind}")
    assert [row["neg"] for row in out] == pools_of(rows, run, kind, source)
    for i, (row, old) in enumerate(zip(out, read_jsonl(source))):
        assert (row["id"], row["query"], row["pos"]) == (i, old["query"], old["pos"])
        assert set(old["neg"]) <= set(row["neg"]) and row["pos"][0] not in row["neg"]
        own, near = row["cosines"][:len(old["neg"])], row["cosines"][len(old["neg"]):]
        assert own == sorted(own, reverse=True) and near == sorted(near, reverse=True)
    embedder = Embedder(run / "embed_weak", "cpu")
    row = out[0]
    query = embedder.encode(row["pos"][0]) if kind == "clr" else \
        embedder.encode(row["query"], prompt=embedder.prompts[kind])
    assert np.allclose(embedder.encode(row["neg"]) @ query, row["cosines"], atol=1e-5)
    assert np.allclose(embedder.encode(row["pos"]) @ query, row["pos_cosines"], atol=1e-5)
    assert list(tmp_path.glob("mined.jsonl*")) == [tmp_path / "mined.jsonl"]


def test_stage_4_embeds_nothing_for_rows_that_bring_cosines(rows, run, tmp_path, monkeypatch):
    out = tmp_path / "mined.jsonl"
    wanted = [row["neg"] for row in mined(run, rows / "retrieval.jsonl", out)]
    monkeypatch.setattr(Embedder, "encode", lambda *_, **__: pytest.fail("a text is embedded"))
    found = pools_of(rows, run, "retrieval", out)
    assert found == wanted


def mine_on(world, cfg):
    mining.TEXTS = 10                      # so that each rank embeds some
    mine.PART, mining.CHUNK = 7, 5
    mine.mine_rows(cfg, world)


def test_ranks_write_the_file_that_one_process_writes(rows, run, tmp_path):
    wanted = mined(run, rows / "retrieval.jsonl", tmp_path / "one.jsonl")
    cfg = mine.MineConfig(str(run / "embed_weak"), (str(rows / "retrieval.jsonl"),),
                          str(tmp_path / "two.jsonl"), depth=6, n_negatives=3, device="cpu")
    on_ranks(3, mine_on, cfg)
    found = list(read_jsonl(tmp_path / "two.jsonl"))
    assert [row["neg"] for row in found] == [row["neg"] for row in wanted]
    assert np.allclose([row["cosines"] for row in found], [row["cosines"] for row in wanted],
                       atol=2e-6)


def test_a_broken_run_continues(rows, run, tmp_path, monkeypatch):
    real, calls = mining.mine, []

    def dies(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(mining, "CHUNK", 8)        # three units
    monkeypatch.setattr(mining, "mine", dies)
    with pytest.raises(KeyboardInterrupt):
        mined(run, rows / "retrieval.jsonl", tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    monkeypatch.setattr(Embedder, "encode", lambda *_, **__: pytest.fail("embedded again"))
    assert len(mined(run, rows / "retrieval.jsonl", tmp_path / "a.jsonl")) == 24 and len(calls) == 4


def test_a_part_that_is_gone_leaves_the_old_file_as_it_is(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    write_lines(tmp_path / "folder" / "0.jsonl", [{"a": 1}])
    with pytest.raises(FileNotFoundError):
        mine.join([tmp_path / "folder" / f"{i}.jsonl" for i in range(2)], out)
    assert out.read_text() == "old"


def test_lexical_candidates_take_their_share_of_the_places(rows, run, tmp_path):
    near = mined(run, rows / "pairs.jsonl", tmp_path / "near.jsonl")
    both = mined(run, rows / "pairs.jsonl", tmp_path / "both.jsonl", "--lexical=2",
                 "--n_negatives=2")                        # as many: the others are searched for
    changed, passages = 0, list(dict.fromkeys(text for row in near for text in row["pos"]))
    bm25 = BM25(passages)
    for one, other in zip(near, both):
        best, scores = (x[0] for x in bm25.top_k([one["query"]], 9))
        known = sum((row["pos"] for row in near if row["query"] == one["query"]), [])
        words = [passages[i] for i in best[scores > 0] if passages[i] not in known][:2]
        assert set(words) <= set(other["neg"])
        assert len(other["neg"]) == len(set(other["neg"])) == 6
        assert set(one["neg"][:4]) <= set(other["neg"]) and other["pos"][0] not in other["neg"]
        assert other["cosines"] == sorted(other["cosines"], reverse=True)
        changed += one["neg"] != other["neg"]
    assert changed > 10
    with pytest.raises(ValueError, match="lexical 6 must lie in 0 .. depth 6 - 1"):
        mined(run, rows / "pairs.jsonl", tmp_path / "x.jsonl", "--lexical=6")


def test_a_passage_that_shares_no_word_is_no_lexical_candidate():
    class Few(list):
        text = list.__getitem__

        def positives(self, q):
            return np.array([0])

        def negatives(self, q):
            return np.array([], dtype=np.int64)
    passages = Few(["a cat", "a dog", "the cat"])
    assert mine.with_lexical([{"query": "cat"}], passages, 2)(0) == [2]


@pytest.mark.extras
def test_faiss_finds_most_of_the_nearest(rows, run, tmp_path, capsys):
    pytest.importorskip("faiss")
    source = write_lines(tmp_path / "rows.jsonl", [
        {"query": f"sort a list {i}", "pos": f"This function sorts list number {i}"}
        for i in range(1200)])
    out = mined(run, source, tmp_path / "near.jsonl", "--search=faiss")
    assert {len(row["neg"]) for row in out} == {6}         # though its positive is among the best
    share = float(capsys.readouterr().out.split("exact search: ")[1].split()[0])
    assert 0.5 < share <= 1


@pytest.mark.parametrize("row, reason", [
    ({"cosines": [0.5]}, "key 'cosines' must be a list of 2 finite numbers"),
    ({"cosines": [0.5, "0.4"]}, "key 'cosines' must be a list of 2 finite numbers"),
    ({"cosines": [0.5, float("1e39")]}, "key 'cosines' must be a list of 2 finite numbers"),
    ({"cosines": {"a": 1}}, "key 'cosines' must be a list of 2 finite numbers")])
def test_cosines_that_do_not_fit_are_named(tmp_path, monkeypatch, row, reason):
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"], "neg": ["a", "b"],
                                                  **row}])
    with pytest.raises(ValueError) as caught:
        data.open_rows([path], "retrieval")
    assert str(caught.value).startswith(f"{path}:1: {reason}")


def test_a_row_is_mined_with_the_instruction_that_training_reads(tmp_path):
    for row, prompt in (({"query": "q", "pos": ["p"], "instruction": "Do", "id": 1}, "Do"),
                        ({"query": "q", "pos": ["p"], "prompt": "", "cosines": []}, ""),
                        ({"query": "x", "input": "", "instruction": "q", "output": "p"}, "")):
        got = mine.parse_row(row)
        assert (got["query"], got["pos"], got["prompt"]) == ("q", ["p"], prompt)
        assert got.keys() - {"id"} == {"query", "pos", "neg", "prompt"}


def test_alpaca_rows_are_mined_as_pairs(rows, run, tmp_path):
    row = mined(run, rows / "pairs.jsonl", tmp_path / "a.jsonl")[0]
    source = json.loads(open(rows / "pairs.jsonl").readline())
    assert (row["query"], row["pos"], row["prompt"]) == (source["input"], [source["output"]],
                                                         "Find")
    assert not {"input", "output", "instruction"} & set(row)


@pytest.mark.parametrize("more", ["--task=clr", "--depth=4", "--n_negatives=1", "--lexical=2"])
def test_a_broken_run_of_other_settings_is_not_continued(rows, run, tmp_path, monkeypatch, more):
    def dies(*_):
        raise KeyboardInterrupt
    source, out = rows / "retrieval.jsonl", tmp_path / "a.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mine, "join", dies)                  # when all parts are written
        mined(run, source, out)
    again, fresh = (mined(run, source, path, more) for path in (out, tmp_path / "b.jsonl"))
    assert [row["neg"] for row in again] == [row["neg"] for row in fresh]


def test_bad_lines_are_named_or_counted(rows, run, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "a.jsonl"
    path.write_text((rows / "retrieval.jsonl").read_text() + "{\n")
    with pytest.raises(ValueError, match="rows.jsonl:25: not JSON"):
        mined(run, path, out)
    assert len(mined(run, path, out, "--skip_bad_lines")) == 24
    assert f"{out}: 24 rows, 1 bad lines left out" in capsys.readouterr().out
