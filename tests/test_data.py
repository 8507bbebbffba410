"""data.py: every format is read or refused by file and line; the order is a function."""
import gzip
import json

import numpy as np
import pytest
import torch

import data
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 285)


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode()
                                for line in lines) + b"\n")
    return path


GOOD = '{"query": "q", "pos": ["p"]}'
BAD_LINES = {
    b'{"query": "q", "pos": [': "not JSON",
    b"": "blank line",
    b"[1, 2]": "a JSON object is needed, not list",
    b'{"query": "q"}': "key 'pos' must be a list",
    b'{"query": 3, "pos": ["p"]}': "key 'query' must be a string, not int",
    b'{"query": "  ", "pos": ["p"]}': "key 'query' is empty",
    b'{"query": "q", "pos": []}': "key 'pos' is an empty list",
    b'{"query": "q", "pos": [""]}': "key 'pos' is empty",
    b'{"query": "q", "pos": ["p"], "neg": [1]}': "key 'neg' must be a string",
    b'{"query": "q", "pos": ["p"], "prompt": 1}': "the prompt must be a string",
    b'{"query": "\xff", "pos": ["p"]}': "not UTF-8",
    b'{"query": NaN, "pos": ["p"]}': "NaN is not a JSON number",
    b'[' * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, reason):
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{reason}".replace("[", r"\[")):
        data.JsonlFile(path, "retrieval", tmp_path)


def test_bad_lines_are_skipped_and_counted_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, *BAD_LINES, GOOD.replace("q\"", "last\""))
    rows = data.JsonlFile(path, "retrieval", tmp_path, skip_bad=True)
    assert (len(rows), rows.bad) == (2, len(BAD_LINES))
    assert rows[1]["pos"] == ["p"]


def test_sts_scores_must_be_finite(tmp_path):
    for score in ("NaN", "Infinity", '"4"', "null", "true"):
        path = write(tmp_path / f"{score.strip(chr(34))}.jsonl",
                     f'{{"sentence1": "a", "sentence2": "b", "score": {score}}}')
        with pytest.raises(ValueError, match=".jsonl:1: "):
            data.JsonlFile(path, "sts", tmp_path)


def test_pairs_come_in_both_spellings():
    a = data.parse_pair({"instruction": "do", "input": "x", "output": "y"})
    b = data.parse_pair({"prompt": "do", "query": "x", "pos": "y"})
    assert a == b == {"query": "x", "pos": ["y"], "neg": [], "prompt": "do"}


def test_missing_empty_and_cut_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        data.JsonlFile(tmp_path / "nothing.jsonl", "text", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl: no usable line"):
        data.JsonlFile(tmp_path / "empty.jsonl", "text", tmp_path)
    whole = gzip.compress(b'{"text": "abc"}\n' * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cut.jsonl.gz"):
        data.JsonlFile(tmp_path / "cut.jsonl.gz", "text", tmp_path)
    with pytest.raises(ValueError, match="cut.jsonl.gz"):
        list(data.read_jsonl(tmp_path / "cut.jsonl.gz"))


def test_random_access_equals_reading_in_order_plain_and_gz(tmp_path):
    lines = [json.dumps({"text": f"text {i} " + "é" * (i % 7)}) for i in range(300)]
    path = write(tmp_path / "a.jsonl", *lines)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    rows = data.Rows([path, packed], "text", tmp_path / "cache")
    in_order = [row["text"] for row in data.read_jsonl(path)] * 2
    assert [rows[i] for i in range(len(rows))] == in_order
    assert data.Rows([path, packed], "text", tmp_path / "cache")[599] == in_order[599]
    write(path, *lines[:10])                       # a changed file gets a new index
    assert len(data.Rows([path], "text", tmp_path / "cache")) == 10


@pytest.mark.parametrize("n", [1, 2, 3, 8, 97, 1000])
def test_each_epoch_is_a_permutation_and_epochs_differ(n):
    epochs = data.shuffled(np.arange(3 * n), n, seed=5).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 8:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(n)).any()


def test_order_is_a_pure_function_of_position():
    """The bug of resumed runs that replay their data: a suffix must not depend on the prefix."""
    whole = data.shuffled(np.arange(500), 120, seed=3)
    assert (data.shuffled(np.arange(311, 500), 120, seed=3) == whole[311:]).all()
    assert (data.shuffled(np.arange(500), 120, seed=4) != whole).any()


def test_tasks_follow_their_weights_and_do_not_depend_on_the_start():
    draw = data.task_of_step(np.arange(20_000), [3.0, 1.0, 0.0, 2.0], seed=1)
    share = np.bincount(draw, minlength=4) / len(draw)
    assert np.allclose(share, [0.5, 1 / 6, 0, 1 / 3], atol=0.015)
    later = data.task_of_step(np.arange(900, 1000), [3.0, 1.0, 0.0, 2.0], 1)
    assert (later == draw[900:1000]).all()


def test_token_windows_predict_the_next_token(tmp_path, tokenizer):
    rows = [f"the fox {i}" for i in range(200)]
    stream = data.TokenStream(rows, tokenizer, tmp_path / "t.bin", seed=0)
    flat = [i for row in rows for i in tokenizer.encode(row) + [tokenizer.eos_id]]
    assert stream.ids.dtype == np.uint32 and stream.ids.tolist() == flat
    batch = data.lm_batch(stream, np.arange(4), 16)
    assert batch.lengths == [16] * 4 and len(batch.ids) == 64
    ids, targets = batch.ids.view(4, 16), batch.targets.view(4, 16)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="too few"):
        stream.windows(np.arange(1), 100_000)


def test_sft_predicts_the_output_and_nothing_of_the_prompt(tokenizer):
    rows = [{"query": "the quick", "pos": ["brown fox"], "neg": [], "prompt": "jumps"}]
    batch = data.sft_batch(rows, [0], tokenizer, 64, None)
    learnt = batch.targets[batch.targets != -100].tolist()
    assert learnt == tokenizer.encode("brown fox") + [tokenizer.eos_id]
    assert tokenizer.decode(batch.ids.tolist()) == "jumps: the quick\n\nbrown fox"
    cut = data.sft_batch(rows, [0], tokenizer, 8, None)
    assert cut.lengths == [8] and cut.truncated == 1 and (cut.targets != -100).any()


def test_contrastive_batches_hold_queries_positives_and_present_negatives(tokenizer):
    rows = [{"query": "the", "pos": ["fox"], "neg": ["dog"], "prompt": None},
            {"query": "lazy", "pos": ["dog", "fox"], "neg": [], "prompt": "over"}]
    passages = data.Passages(rows)
    assert [passages.text(i) for i in range(len(passages))] == ["fox", "dog"]
    assert passages.positives == [[0], [1, 0]] and passages.given == [[1], []]
    batch = data.contrastive_batch("retrieval", rows, [0, 1], tokenizer, 8, 8, "find",
                                   np.array([[1, -1], [-1, -1]]), passages)
    texts, at = [], 0
    for length in batch.lengths:
        texts.append(tokenizer.decode(batch.ids[at:at + length].tolist()))
        at += length
    assert texts == ["find: the", "over: lazy", "fox", "fox", "dog"]
    assert batch.positive_ids[0] == batch.positive_ids[1] == data.text_id("fox")
    assert batch.negative_ids.tolist() == [[data.text_id("dog"), -1], [-1, -1]]


def test_long_texts_are_cut_and_counted_and_chunks_cover_the_batch(tokenizer):
    batch = data.Batch.of("sts", ["fox " * 50, "dog", "the"], [4, 4, 4], tokenizer, np.arange(3))
    assert batch.lengths[0] == 4 and batch.truncated == 1
    parts = list(batch.chunks(2))
    assert [lengths for _, lengths, _ in parts] == [batch.lengths[:2], batch.lengths[2:]]
    assert torch.equal(torch.cat([ids for ids, _, _ in parts]), batch.ids)


def test_mining_leaves_out_positives_and_equal_texts_and_orders_by_score():
    passages = np.eye(4, dtype=np.float32)
    queries = np.array([[0.9, 0.8, 0.7, 0.1]], dtype=np.float32)
    ids = [10, 11, 12, 13]
    assert data.mine(queries, passages, [[0]], ids, depth=3).tolist() == [[1, 2, 3]]
    assert data.mine(queries, passages, [[0]], [10, 10, 12, 13], depth=3).tolist() == [[2, 3, -1]]
    assert data.mine(queries, passages, [[0]], ids, 3, cap=0.8).tolist() == [[2, 3, -1]]
    assert data.mine(queries, passages, [[1]], ids, 1, extra=np.array([[3]])).tolist() == [[0]]


def test_collections_are_checked(tmp_path):
    write(tmp_path / "corpus.jsonl", '{"id": "d", "text": "a"}', '{"_id": "e", "text": "b"}')
    write(tmp_path / "queries.jsonl", '{"id": "q", "text": "a", "split": "dev"}')
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore", "q\td\t1", "q\te\t0.5")
    found = data.load_collection(tmp_path, "dev")
    assert found.qrels == {"q": {"d": 1.0, "e": 0.5}} and len(found.corpus) == 2
    with pytest.raises(ValueError, match="no query of split 'test'"):
        data.load_collection(tmp_path, "test")
    for line, reason in (("q\tnobody\t1", "unknown document 'nobody'"), ("q\td", "needed"),
                         ("q\td\tnan", "not finite")):
        write(tmp_path / "qrels.tsv", line)
        with pytest.raises(ValueError, match=f"qrels.tsv:1: .*{reason}"):
            data.load_collection(tmp_path)
    write(tmp_path / "corpus.jsonl", '{"id": "d", "text": "a"}', '{"id": "d", "text": "b"}')
    with pytest.raises(ValueError, match="corpus.jsonl:2: id 'd'"):
        data.load_collection(tmp_path)
