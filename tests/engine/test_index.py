"""The index of rows: cut into any ranges, built by any number of ranks, it is the same."""
import contextlib
import gzip
import hashlib
import json
import os
import random
import time

import numpy as np
import pytest

from data import parse_pair, parse_text
from engine import index, jsonl
from engine.index import JsonlFiles, together
from ranks import on_ranks, write_lines

LINES = [json.dumps({"text": f"text {i} " + "é" * (i % 30)}).encode() for i in range(200)]
PAIRS = [{"query": f"q{i % 7}", "pos": [f"p{i}", "same"][:1 + i % 2], "prompt": "Find",
          "neg": [f"n{i % 5}", f"p{i - 1}"]} for i in range(120)]


def content(rows):
    """Return all that an index says of its files."""
    return [[rows[i] for i in range(len(rows))], rows.bad, dict(rows.prompts),
            [file.offsets.tolist() for file in rows.files]]


@pytest.mark.parametrize("size", [3, 100, 4096])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n\n"])
def test_ranges_of_any_size_give_the_same_index(tmp_path, monkeypatch, size, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(LINES[:20]) + end)
    right = content(JsonlFiles([path], parse_text, tmp_path / "whole"))
    monkeypatch.setattr(index, "RANGE", size)
    assert content(JsonlFiles([path], parse_text, tmp_path / "parts")) == right
    assert len(list((tmp_path / "parts").iterdir())) == 2              # nothing is left over


@pytest.mark.parametrize("size", [7, 50, 4096])
def test_the_first_bad_line_is_named_wherever_it_lies(tmp_path, monkeypatch, size):
    monkeypatch.setattr(index, "RANGE", size)
    path, rng = tmp_path / "rows.jsonl", random.Random(size)
    for _ in range(6):
        lines = rng.choices([LINES[0], b"", b" ", b"{", b'{"txt": 1}'], [12, 1, 1, 1, 1], k=20)
        path.write_bytes(b"\n".join([*lines, LINES[1]]))
        bad = [i for i, line in enumerate(lines, 1) if line != LINES[0]]
        rows = JsonlFiles([path], parse_text, tmp_path / "cache", skip_bad=True)
        assert rows.bad == len(bad) and len(rows) == 21 - len(bad)
        if bad:
            with pytest.raises(ValueError, match=rf"^{path}:{bad[0]}: "):
                JsonlFiles([path], parse_text, tmp_path / "cache")


def test_the_most_frequent_instruction_is_counted_however_many_there_are(tmp_path):
    rows = [{"query": "q", "pos": ["p"], "prompt": f"do {i}"} for i in range(3000)]
    rows[1000::2] = [{**row, "prompt": "Find"} for row in rows[1000::2]]
    rows[501]["prompt"] = longest = "一二三四五六七"          # in bytes, as tokens are
    rows += [{"query": "q", "pos": ["p"]}] * 7
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = JsonlFiles([tmp_path / "rows.jsonl"], parse_pair, tmp_path / "cache")
    (name, count), = found.prompts.most_common(1)          # forgotten once, when it was rare
    assert name == "Find" and 990 < count <= 1000 >= len(found.prompts)
    assert found.bare == 7 and longest in found.prompts


def index_on(world, folder, paths):
    index.RANGE = 300
    rows = JsonlFiles(paths, parse_pair, folder / "cache", ids=True, world=world)
    told = together(world, lambda: content(rows))
    assert all(part == told[0] for part in told)
    (folder / "told.json").write_text(json.dumps(told[0]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_build_one_index_of_plain_and_packed_files(tmp_path, ranks):
    paths = [write_lines(tmp_path / f"{name}.jsonl", PAIRS[a:b])
             for name, a, b in (("a", 0, 60), ("b", 60, 61), ("c", 61, 120))]
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(paths[0].read_bytes()))
    paths += [packed, paths[1]]                            # the last one is given twice
    on_ranks(ranks, index_on, tmp_path, paths)
    alone = JsonlFiles(paths, parse_pair, tmp_path / "alone", ids=True)
    assert json.loads((tmp_path / "told.json").read_text()) == content(alone)


def fail_on(world, folder):
    index.RANGE = 300
    with pytest.raises(ValueError, match="rows.jsonl:150: not JSON"):
        JsonlFiles([folder / "rows.jsonl"], parse_text, folder / "cache", world=world)


def apart(world, folder):
    own = folder / f"node{world.rank}"
    own.mkdir()
    path = write_lines(own / "rows.jsonl", PAIRS[:9])
    with pytest.raises(ValueError, match="rows.jsonl and others: not the same files on all ranks"):
        JsonlFiles([path], parse_pair, folder / "cache", world=world)
    (folder / "node0/rows.jsonl").unlink(missing_ok=True)  # now one rank alone lacks its file
    with pytest.raises(FileNotFoundError, match="node0/rows.jsonl"):
        JsonlFiles([path], parse_pair, folder / "cache", world=world)


def test_each_node_with_files_of_its_own_is_an_error(tmp_path):
    on_ranks(2, apart, tmp_path)


def test_all_ranks_raise_the_error_of_one(tmp_path):
    lines = [*LINES[:149], b"{", *LINES[149:]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    on_ranks(3, fail_on, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_second_start_reads_no_row(tmp_path, monkeypatch, capsys):
    path = write_lines(tmp_path / "rows.jsonl", PAIRS)
    right = content(JsonlFiles([path], parse_pair, tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(index.JsonlFile, "_check", lambda *_: pytest.fail("a line is checked"))
        patch.setattr(jsonl, "sha256_of", lambda _: pytest.fail("a file is hashed"))
        again = JsonlFiles([path], parse_pair, tmp_path / "cache")
    assert content(again) == right and "damaged" not in "".join(capsys.readouterr())
    damaged, = (tmp_path / "cache").glob("*.idx")
    raw = bytearray(damaged.read_bytes())
    raw[100] ^= 1
    damaged.write_bytes(raw)
    assert content(JsonlFiles([path], parse_pair, tmp_path / "cache")) == right
    assert f"{damaged} is damaged or unfinished; it is built again" in "".join(capsys.readouterr())
    note = damaged.with_suffix(".json")                    # and so is what is said of it
    note.write_text(note.read_text().replace('"lengths": [120', '"lengths": [119'))
    assert content(JsonlFiles([path], parse_pair, tmp_path / "cache")) == right
    assert f"{damaged} is damaged or unfinished; it is built again" in "".join(capsys.readouterr())


def test_an_unpacked_file_that_changed_is_unpacked_again(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(LINES)))
    right = content(JsonlFiles([path], parse_text, tmp_path / "cache"))
    unpacked, = (tmp_path / "cache").glob("*.jsonl")
    unpacked.write_bytes(unpacked.read_bytes().replace(b"text 7 ", b"text 8 "))
    assert content(JsonlFiles([path], parse_text, tmp_path / "cache")) == right


def test_a_part_that_another_process_cut_is_an_error(tmp_path, monkeypatch):
    real, path = index._join, write_lines(tmp_path / "rows.jsonl", PAIRS)

    def cut(job, parts):
        os.truncate(parts[0][0], 80)
        return real(job, parts)
    monkeypatch.setattr(index, "_join", cut)
    with pytest.raises(OSError, match="was cut while in use; start again"):
        JsonlFiles([path], parse_pair, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("size", [0, 24, 2000])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_that_shrinks_while_it_is_read_does_not_hang(tmp_path, size, skip_bad):
    path, cut = write_lines(tmp_path / "rows.jsonl", PAIRS * 20), []

    def parse(row):
        if not cut:
            os.truncate(path, size)
        cut.append(row)
        return parse_pair(row)
    with contextlib.suppress(ValueError):                  # of the line that was cut
        JsonlFiles([path], parse, tmp_path / "cache", skip_bad)
    assert len(cut) < len(PAIRS) * 20


def test_the_hash_of_a_large_file_is_that_of_its_ranges(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(LINES))
    small = JsonlFiles([path], parse_text, tmp_path / "cache").files[0].sha256
    assert small == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(index, "RANGE", 1000)
    hashes = [JsonlFiles([path], parse_text, tmp_path / name).files[0].sha256 for name in "ab"]
    path.write_bytes(b"\n".join([LINES[1], LINES[0], *LINES[2:]]))
    other = JsonlFiles([path], parse_text, tmp_path / "c").files[0].sha256
    assert hashes[0] == hashes[1] != other and hashes[0] != small


@pytest.mark.parametrize("size", [300, index.RANGE])               # many parts, and one
def test_ids_of_the_texts_stand_in_the_index(tmp_path, monkeypatch, size):
    monkeypatch.setattr(index, "RANGE", size)
    rows = JsonlFiles([write_lines(tmp_path / "a.jsonl", PAIRS)], parse_pair, tmp_path, ids=True)
    file, texts = rows.files[0], [text for row in PAIRS for text in row["pos"] + row["neg"]]
    assert file.ids.tolist() == [index.text_id(text) for text in texts]
    assert file.n_pos.tolist() == [len(row["pos"]) for row in PAIRS]
    assert file.query_ids.tolist() == [index.text_id(row["query"]) for row in PAIRS]
    assert np.array_equal(file.first, np.cumsum([0, *(len(row["pos"]) + 2 for row in PAIRS)])[:-1])


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path):
    """As `cp -p` and `touch -r` do: the time of the last change of the inode tells."""
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}])
    first, stat = JsonlFiles([path], parse_text, tmp_path / "cache").hashes, path.stat()
    time.sleep(0.05)                                       # a tick of the file system's clock
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = JsonlFiles([path], parse_text, tmp_path / "cache")
    assert again.hashes != first and again[0] == "two"
