"""JSONL files: every bad line is named or counted, every good byte comes through, nothing is half.

One case for each message. tests/test_fuzz.py tries random inputs.
"""
import gzip
import json
import os

import pytest

from data import parse_pair, parse_text
from engine import jsonl
from engine.index import JsonlFiles
from engine.jsonl import atomic, check_name, read_jsonl, read_texts, write_jsonl
from ranks import full_disk

GOOD = b'{"text": "a"}'
BAD_LINES = {                          # a line -> the reason that the error gives
    b"  \t": "blank line",
    b"\xef\xbb\xbf": "blank line",                             # a byte order mark alone
    b'{"text": "a",}': "not JSON (",
    b'{"text": "a"} {"text": "b"}': "not JSON (Extra data",
    b'{"text": "a\x00b"}': "not JSON (Invalid control character",
    b'{"text": NaN}': "NaN is not a JSON number",
    b'{"text": -Infinity}': "-Infinity is not a JSON number",
    b'{"text": ' + b"9" * 5000 + b"}": "Exceeds the limit",
    b'{"text": "a", "more": {"x": 1, "x": 2}}': "a key comes twice in ['x', 'x']",
    b'{"text": "\xe9t\xe9"}': "not UTF-8 (invalid continuation byte at byte 10)",      # Latin-1
    b"\xff\xfe{\x00}\x00": "not UTF-8",                        # UTF-16
    b"\x1f\x8b\x08\x00": "not UTF-8",                          # gzip without its suffix
    b"null": "a JSON object is needed, not NoneType",
    b'[{"text": "a"}]': "a JSON object is needed, not list",
    b"[" * 100_000: "nested too deeply",
    b"y" * 10_000_000: "not JSON",
}


def file_of(folder, *lines, name="rows.jsonl", end=b"\n"):
    path = folder / name
    raw = b"\n".join(lines) + end
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    return path


def all_of(rows):
    return [rows[i] for i in range(len(rows))]


# ---------------------------------------------------------------- lines

@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_by_file_and_number_or_counted(tmp_path, line, reason):
    path = file_of(tmp_path, GOOD, line, GOOD)
    for read in (lambda: list(read_jsonl(path)), lambda: JsonlFiles([path], parse_text, tmp_path)):
        with pytest.raises(ValueError) as caught:
            read()
        assert type(caught.value) is ValueError and str(caught.value).startswith(f"{path}:2: ")
        assert reason in str(caught.value) and len(str(caught.value)) < 1000
    rows = JsonlFiles([path], parse_text, tmp_path, skip_bad=True)
    assert (len(rows), rows.bad, rows[1]) == (2, 1, "a")


@pytest.mark.parametrize("required, reason", [
    ({"text": str, "id": str}, "key 'id' is missing; the keys are ['n', 'text', 'title']"),
    ({"text": int}, "key 'text' must be int, not str"),
    ({"n": (int, float)}, "key 'n' must be int or float, not bool"),   # a bool is no number
    ({"text": str}, "key 'title' must be str, not int"),               # optional everywhere
])
def test_keys_that_a_format_needs(tmp_path, required, reason):
    path = file_of(tmp_path, b'{"text": "a", "n": true, "title": 7}')
    with pytest.raises(ValueError) as caught:
        list(read_jsonl(path, required))
    assert str(caught.value) == f"{path}:1: {reason}"
    assert len(list(read_jsonl(path))) == 1        # asked for nothing, nothing is missed


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\n \n\t\n", b"\r\n\r\n", b"\n" * 70_000])
def test_blank_lines_at_the_end_are_no_mistake(tmp_path, end):
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        path = file_of(tmp_path, GOOD, b'{"text": "b"}', name=name, end=end)
        assert [row["text"] for row in read_jsonl(path)] == ["a", "b"]
        assert all_of(JsonlFiles([path], parse_text, tmp_path / "cache")) == ["a", "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(tmp_path):
    path = file_of(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r')
    assert all_of(JsonlFiles([path], parse_text, tmp_path)) == ["a", "b"]
    assert [row["text"] for row in read_jsonl(path)] == ["a", "b"]


@pytest.mark.parametrize("text", [
    "\ufeffmark", "a\u0000b", "\u202eright to left", "e\u0301", "👩‍👩‍👧", "\uffff", "\r",
    "<|endoftext|>", "a\u2028b\u2029c\u0085d", "\x1b[2J", "word " * 400_000])
def test_odd_texts_come_through_unchanged(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": f"x{text}"}])
    assert JsonlFiles([path], parse_text, tmp_path)[0] == f"x{text}"
    path.write_text(json.dumps({"text": f"{text}y"}) + "\n")   # escaped
    assert next(read_jsonl(path)) == {"text": f"{text}y"}


@pytest.mark.parametrize("escaped, text", [(rb"a\ud800b", "a?b"), (rb"\uD83D\uDE00", "😀"),
                                           (rb"\uDE00\uD83D", "??"), (rb"\\ud800", r"\ud800")])
def test_lone_surrogates_become_question_marks(tmp_path, escaped, text):
    path = file_of(tmp_path, b'{"query": "%s", "pos": ["%s"], "prompt": "%s"}' % (
        escaped, escaped, escaped))
    row = JsonlFiles([path], parse_pair, tmp_path)[0]
    assert row == {"query": text, "pos": [text], "neg": [], "prompt": text}
    assert jsonl.to_line({"text": "a\ud800b"}) == b'{"text": "a?b"}\n'


# ---------------------------------------------------------------- files

def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as other:
        one.write("one")
        other.write("other")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")           # of its own: root would lose a /dev/null to a mistake
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic(tmp_path / "pipe") as file:
        file.write("x")
    assert os.read(reader, 9) == b"x" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    with pytest.raises(ValueError, match="leave .gz out of the name"), atomic(tmp_path / "a.gz"):
        pass


WHOLE_GZ = gzip.compress(b"".join(b'{"text": "number %d"}\n' % i for i in range(3000)))


def flipped(at):
    broken = bytearray(WHOLE_GZ)
    broken[at] ^= 0xFF
    return bytes(broken)


BAD_FILES = {
    "empty.jsonl": (b"", "no usable line"), "newlines.jsonl": (b"\n\n\n", "no usable line"),
    "empty_inside.jsonl.gz": (gzip.compress(b""), "no usable line"),
    "not_gz.jsonl.gz": (GOOD, "cannot be read to the end: Not a gzipped file"),
    "half.jsonl.gz": (WHOLE_GZ[:len(WHOLE_GZ) // 2], "the end: Compressed file ended"),
    "deflate.jsonl.gz": (flipped(len(WHOLE_GZ) // 2), "cannot be read to the end"),
    "crc.jsonl.gz": (flipped(len(WHOLE_GZ) - 8), "cannot be read to the end: CRC check failed"),
    "rubbish.jsonl.gz": (WHOLE_GZ + b"rubbish", "cannot be read to the end"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_named_and_leaves_no_half_of_an_index(tmp_path, name):
    path, (raw, reason) = tmp_path / name, BAD_FILES[name]
    path.write_bytes(raw)
    for skip in (False, True):                     # what cannot be read cannot be skipped either
        with pytest.raises(ValueError) as caught:
            JsonlFiles([path], parse_text, tmp_path / "cache", skip_bad=skip)
        assert str(path) in str(caught.value) and reason in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))
    if "the end" in reason:
        with pytest.raises(ValueError, match=rf"{name}:\d+: (cannot be read to the end|not JSON)"):
            list(read_jsonl(path))
        with pytest.raises(ValueError, match=rf"{name}:\d+: (cannot be read to the end|not JSON)"):
            read_texts(path)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe.jsonl", "folder.jsonl", "loop.jsonl", "none.jsonl", "x" * 300):
        for read in (lambda: JsonlFiles([tmp_path / name], parse_text, tmp_path),
                     lambda: list(read_jsonl(tmp_path / name))):
            with pytest.raises((OSError, ValueError), match=name):
                read()


def test_suffixes_that_say_json():
    for name in ("x.jsonl", "x.NDJSON", "x.json", "x.jsonl.gz", "a.b/x.JSON.GZ"):
        assert jsonl.is_json(name), name
    for name in ("x.txt", "x.jsonl.bak", "jsonl", "x.gz", "x.jsonl.zip"):
        assert not jsonl.is_json(name), name


def test_texts_are_lines_or_rows_by_the_name_of_the_file(tmp_path):
    lines = '{"text": "é"}\n{"text": "b"}\n'
    for name in ("a.jsonl", "a.json", "a.NDJSON"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines.encode())
        assert read_texts(tmp_path / name) == ["é", "b"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_texts(tmp_path / "a.jsonl.gz") == ["é", "b"]
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n\nb\u2028c\n".encode())
    assert read_texts(tmp_path / "a.txt") == ["é", "", "b\u2028c"]


@pytest.mark.parametrize("encoding, reason", [("utf-16", ":1: not UTF-8"),
                                              ("utf-16-le", ":1: holds a zero byte"),
                                              ("latin-1", ":2: not UTF-8")])
def test_texts_in_another_encoding_are_refused_by_line(tmp_path, encoding, reason):
    path = tmp_path / "a.txt"
    path.write_bytes("plain\ncafé\n".encode(encoding))
    with pytest.raises(ValueError) as caught:
        read_texts(path)
    assert str(caught.value).startswith(f"{path}{reason}")


# ---------------------------------------------------------------- random access

def test_random_access_equals_reading_in_order_plain_and_packed(tmp_path):
    lines = [json.dumps({"text": f"text {i} " + "é" * (i % 7)}).encode() for i in range(300)]
    path = file_of(tmp_path, *lines)
    packed = file_of(tmp_path, *lines, name="b.jsonl.gz")
    packed.write_bytes(packed.read_bytes() + gzip.compress(b'{"text": "of a second member"}\n'))
    rows = JsonlFiles([path, packed], parse_text, tmp_path / "cache")
    in_order = [row["text"] for row in read_jsonl(path)] * 2 + ["of a second member"]
    assert all_of(rows) == in_order
    assert JsonlFiles([path, packed], parse_text, tmp_path / "cache")[600] == in_order[600]
    file_of(tmp_path, *lines[:10])                 # a changed file gets a new index
    assert len(JsonlFiles([path], parse_text, tmp_path / "cache")) == 10


def test_instructions_and_bad_lines_are_counted_over_all_files(tmp_path):
    def row(prompt):
        return json.dumps({"query": "q", "pos": ["p"], "prompt": prompt}).encode()
    one = file_of(tmp_path, row("Find"), row(None), row(""), name="one.jsonl")
    two = file_of(tmp_path, b"{", row("Find"), row("Name"), name="two.jsonl")
    for _ in range(2):                             # built, then read from the index
        rows = JsonlFiles([one, two], parse_pair, tmp_path / "cache", skip_bad=True)
        assert rows.prompts == {"Find": 2, "": 1, "Name": 1} and rows.bad == 1


DAMAGE = {"empty": lambda raw: b"", "shorter": lambda raw: raw[:-5],
          "longer": lambda raw: raw + bytes(16), "zeros": lambda raw: bytes(len(raw)),
          "null": lambda raw: b"null"}


@pytest.mark.parametrize("suffix, damage", [
    (suffix, name) for suffix in ("idx", "json", "jsonl") for name in DAMAGE
    if (suffix, name) != ("jsonl", "zeros")])      # of equal size: its lines are checked in use
def test_a_damaged_index_is_built_again(tmp_path, damage, suffix):
    path = file_of(tmp_path, GOOD, b'{"text": "b"}', name="rows.jsonl.gz")
    JsonlFiles([path], parse_text, tmp_path / "cache")
    index, = (tmp_path / "cache").glob(f"*.{suffix}")
    index.write_bytes(DAMAGE[damage](index.read_bytes()))
    assert all_of(JsonlFiles([path], parse_text, tmp_path / "cache")) == ["a", "b"]


def test_a_file_that_changes_while_it_is_used_is_noticed(tmp_path):
    path = file_of(tmp_path, b'{"text": "aaa"}', b'{"text": "bbb"}')
    rows = JsonlFiles([path], parse_text, tmp_path)
    path.write_bytes(b'{"text": "a longer one"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="rows.jsonl: row 2 changed while in use"):
        rows[1]


# ---------------------------------------------------------------- writing

def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    check_name("")
    check_name(tmp_path / "new", [tmp_path / "old"])
    for name, reason in (("a.gz", "not packed"), (tmp_path, "a folder has this name"),
                         (tmp_path / "b" / ".." / "old", "the input would be replaced")):
        with pytest.raises(ValueError, match=reason):
            check_name(name, [tmp_path / "old"])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    with atomic(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    with pytest.raises(KeyboardInterrupt):
        with atomic(path, "wb") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == "é\n".encode() and os.listdir(path.parent) == ["a.json"]


def test_rows_are_written_as_they_are_read(tmp_path):
    rows = [{"text": "日本語\u2028", "n": 1.5}, {"text": "b", "title": None}]
    write_jsonl(tmp_path / "a.jsonl", iter(rows))
    assert list(read_jsonl(tmp_path / "a.jsonl")) == rows
    assert "日本語" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")      # for people to read


def test_a_full_disk_leaves_no_half_index(tmp_path):
    path = file_of(tmp_path, *[GOOD] * 5000)
    with full_disk(20_000), pytest.raises(OSError, match="too large"):
        JsonlFiles([path], parse_text, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, real=getattr(os, name):
                            calls.append(name) or real(*args))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert calls == ["fsync", "replace"]


def test_texts_may_come_from_a_pipe():
    read, write = os.pipe()
    os.write(write, b"one\ntwo\n")
    os.close(write)
    try:
        assert read_texts(f"/dev/fd/{read}") == ["one", "two"]
    finally:
        os.close(read)
