"""Passages by number: the tables equal a dict of texts, in one bucket or 64, on any ranks."""
import random

import pytest

from data import parse_pair
from engine import passages
from engine.index import JsonlFiles, together
from engine.passages import Passages
from ranks import on_ranks, write_lines


def plain(rows):
    """Return what the tables stand for, as Python objects: texts, positives, negatives."""
    number, positives, given, same = {}, [], [], {}
    for q, row in enumerate(rows):
        positives.append([number.setdefault(text, len(number)) for text in row["pos"]])
        given.append([number.setdefault(text, len(number)) for text in row["neg"]])
        same.setdefault(row["query"], []).append(q)
    for group in same.values():
        shared = [p for q in group for p in positives[q]]
        for q in group:
            positives[q] = list(dict.fromkeys(positives[q] + shared))
            given[q] = [p for p in dict.fromkeys(given[q]) if p not in positives[q]]
    return list(number), positives, given


def write_files(folder, n=300):
    rng = random.Random(n)
    rows = [{"query": f"q{rng.randrange(n)}", "pos": [f"p{rng.randrange(n)}" for _ in range(
        rng.randint(1, 3))], "neg": [f"p{rng.randrange(2 * n)}" for _ in range(rng.randint(0, 4))]}
        for _ in range(n)]
    return rows, [write_lines(folder / f"{a}.jsonl", rows[a:b]) for a, b in
                  ((0, 100), (100, 101), (101, n))]


def assert_right(rows, table):
    texts, positives, given = plain(rows)
    assert [table.text(i) for i in range(len(table))] == texts
    assert [table.positives(q).tolist() for q in range(len(rows))] == positives
    assert [table.negatives(q).tolist() for q in range(len(rows))] == given


def table_on(world, folder, rows, paths):
    passages.SMALL = 0
    files = JsonlFiles(paths, parse_pair, folder / "cache", ids=True, world=world)
    table = Passages(files, world)
    together(world, lambda: assert_right(rows, table))


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_tables_equal_a_dict_of_texts(tmp_path, monkeypatch, small):
    monkeypatch.setattr(passages, "SMALL", small)
    monkeypatch.setattr(passages, "CHUNK", 64)
    rows, paths = write_files(tmp_path)
    assert_right(rows, Passages(JsonlFiles(paths, parse_pair, tmp_path, ids=True)))


def test_ranks_build_one_table(tmp_path):
    rows, paths = write_files(tmp_path)
    on_ranks(3, table_on, tmp_path, rows, paths)


def test_passages_of_rows_that_repeat_each_other(tmp_path):
    rows = [{"query": "q", "pos": ["a", "a"], "neg": ["a", "b", "b"]},
            {"query": "q", "pos": ["b"], "neg": ["c"]}]
    table = Passages(JsonlFiles([write_lines(tmp_path / "a.jsonl", rows)], parse_pair, tmp_path,
                                ids=True))
    assert [table.text(i) for i in range(len(table))] == ["a", "b", "c"]
    assert [set(table.positives(q).tolist()) for q in (0, 1)] == [{0, 1}, {0, 1}]
    assert [table.negatives(q).tolist() for q in (0, 1)] == [[], [2]]  # no positive of the other


def test_a_damaged_table_is_named_and_built_again(tmp_path, capsys):
    rows, paths = write_files(tmp_path)
    files = JsonlFiles(paths, parse_pair, tmp_path, ids=True)
    Passages(files)
    for path in tmp_path.glob("*.tab"):
        raw = bytearray(path.read_bytes())
        raw[8] ^= 255
        path.write_bytes(raw)
        assert_right(rows, Passages(files))
        assert f"{path} is damaged or unfinished; it is built again" in "".join(capsys.readouterr())
