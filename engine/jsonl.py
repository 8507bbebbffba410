"""JSONL files: read them with clear errors, by number without loading them, and write them safely.

One JSON object a line, UTF-8, plain or .gz; .ndjson and .json are taken for the same. A byte order
mark is passed over. A bad line is named by file and line. `JsonlFile` gives random access to files
larger than memory: it checks every line once, and keeps the byte offsets beside the other caches.
`atomic` is the one place where a file is written aside, synced and renamed.
"""
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

SUFFIXES = (".jsonl", ".ndjson", ".json")


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file to write; it appears under its name when it is whole, and not at all on an error.

    mode: "w" (UTF-8, "\\n" as line end) or "wb". The folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def to_line(row):
    """Return a row as one line of JSONL, bytes; a lone surrogate becomes "?"."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def write_jsonl(path, rows):
    """Write rows (dicts) as JSONL."""
    with atomic(path, "wb") as file:
        for row in rows:
            file.write(to_line(row))


def is_json(path):
    """Tell whether a file's name says JSONL, packed or not: x.jsonl, x.NDJSON, x.json.gz."""
    name = Path(path).name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES)


# ---------------------------------------------------------------- one line

def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _no_key_twice(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key comes twice in {[key for key, _ in pairs][:8]}")
    return row


_JSON = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_key_twice)


def parse_line(line, required=None):
    """Parse one line (bytes) to a dict; raise ValueError with the reason if it is something else.

    required: {key: type or tuple of types}. A lone surrogate, which UTF-8 cannot hold, becomes "?".
    """
    try:
        text = line.decode("utf-8-sig")
        row = _JSON.decode(text)
        if "\\ud" in text.lower():
            row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        reason = "blank line" if not text.strip("\ufeff \t\r\n") else f"not JSON ({error})"
        raise ValueError(reason) from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    for key, kind in (required or {}).items():
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the keys are {sorted(row)[:8]}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise ValueError(f"key {key!r} must be {_name(kind)}, not {type(row[key]).__name__}")
    for key in ("title", "lang", "split") if required else ():      # optional everywhere
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"key {key!r} must be str, not {type(row[key]).__name__}")
    return row


def _name(kind):
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


# ---------------------------------------------------------------- whole files

def open_binary(path):
    """Open a plain or .gz file to read bytes; FileNotFoundError by name if there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path):
    """Yield (number, line as bytes); ValueError "path:line: reason" for a damaged or cut .gz."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except FileNotFoundError:
        raise
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read to the end: {error}") from error


def lines_of(path):
    """Yield (number, line as bytes) of a file, without blank lines at its end.

    Raises ValueError "path:line: reason" where a .gz file is damaged or cut.
    """
    blank = []
    for number, line in _lines(path):
        if line.strip():
            yield from blank
            yield number, line
            blank = []
        else:
            blank.append((number, line))               # bad only if another line follows


def read_jsonl(path, required=None, skip_bad=False, on_bad=None):
    """Yield the rows (dicts) of a JSONL file.

    required: {key: type or tuple of types} that every row must have. A bad line raises ValueError
    "path:line: reason"; with `skip_bad` it is left out and reported to `on_bad(message)`.
    """
    for number, line in lines_of(path):
        try:
            row = parse_line(line, required)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{path}:{number}: {error}") from None
            if on_bad:
                on_bad(f"{path}:{number}: {error}")
            continue
        yield row


def read_texts(path):
    """Return the texts of a file: its {"text"} rows if its name says JSON, else its lines."""
    if is_json(path):
        return [row["text"] for row in read_jsonl(path, {"text": str})]
    texts = []
    for number, line in _lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte "
                             f"{error.start})") from None
        if "\x00" in text:
            raise ValueError(f"{path}:{number}: holds a zero byte: UTF-16, or no text")
        texts.append(text.rstrip("\r\n"))
    return texts


# ---------------------------------------------------------------- random access

def _sha256(path):
    """Return the SHA-256 of a file that need not fit into memory."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


class JsonlFile:
    """The rows of a file that need not fit into memory, by number.

    parse: dict -> row, raises ValueError for a bad one. The first opening checks every line and
    writes an index of byte offsets into `cache_dir`; a .gz file is unpacked there once. Later
    openings map the index, if path, size and times of the file are the same.
    `sha256` is the hash of the content, `bad` the number of lines that `skip_bad` left out,
    `prompts` a Counter of the rows' own prompts (the first 100 different ones).
    """

    def __init__(self, path, parse, cache_dir="out/cache", skip_bad=False):
        self.path, self.parse = Path(path), parse
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        stat = self.path.stat()
        state = (f"2 {self.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} "
                 f"{parse.__name__} {skip_bad}")
        key = hashlib.sha256(os.fsencode(state)).hexdigest()[:24]
        index = Path(cache_dir) / f"{key}.idx"
        self.plain = self.path
        if self.path.name.lower().endswith(".gz"):
            self.plain = index.with_suffix(".jsonl")
        about = self._load_about(index) or self._build(index, skip_bad)
        self.sha256, self.bad = about["sha256"], about["bad"]
        self.prompts = Counter(about["prompts"])
        self.offsets = np.memmap(index, np.int64, "r").reshape(-1, 2)       # (rows, 2)
        self._file = None

    def _load_about(self, index):
        """Return what the index says of its file, or None if it is missing or damaged."""
        try:
            about = json.loads(index.with_suffix(".json").read_bytes())
            whole = about["size"] == self.plain.stat().st_size \
                and index.stat().st_size == 16 * about["rows"] \
                and about["index"] == _sha256(index)
            return about if whole else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _build(self, index, skip_bad):
        """Check every line and write the index; nothing of it is left after an error."""
        if self.plain != self.path:
            try:
                with gzip.open(self.path) as source, atomic(self.plain, "wb") as target:
                    shutil.copyfileobj(source, target)
            except (EOFError, zlib.error, OSError) as error:
                raise ValueError(f"{self.path}: cannot be unpacked: {error}") from error
        try:
            with atomic(index, "wb") as target:
                about = self._scan(target, skip_bad)
            about["index"] = _sha256(index)
            with atomic(index.with_suffix(".json")) as file:
                json.dump(about, file)
        except (ValueError, OSError):
            if self.plain != self.path:
                self.plain.unlink()
            raise
        return about

    def _scan(self, target, skip_bad):
        rows = bad = position = 0
        sha256, prompts, blank = hashlib.sha256(), Counter(), None
        with open(self.plain, "rb") as file:
            for number, line in enumerate(file, 1):
                sha256.update(line)
                start, position = position, position + len(line)
                if not line.strip():
                    blank = blank or []
                    blank.append(number)               # bad only if another line follows
                    continue
                for number_before in blank or []:
                    bad += self._bad(number_before, "blank line", skip_bad)
                blank = None
                try:
                    row = self.parse(parse_line(line))
                except ValueError as error:
                    bad += self._bad(number, error, skip_bad)
                    continue
                target.write(struct.pack("=2q", start, number))
                rows += 1
                if isinstance(row, dict) and row.get("prompt") is not None \
                        and (row["prompt"] in prompts or len(prompts) < 100):
                    prompts[row["prompt"]] += 1
        if not rows:
            raise ValueError(f"{self.path}: no usable line ({bad} bad ones)")
        return {"rows": rows, "bad": bad, "size": position, "sha256": sha256.hexdigest(),
                "prompts": prompts}

    def _bad(self, number, reason, skip_bad):
        if not skip_bad:
            raise ValueError(f"{self.path}:{number}: {reason}")
        return 1

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        """Return row `i`, parsed; the file is read at its place only."""
        if self._file is None:
            self._file = open(self.plain, "rb")
        start, number = self.offsets[i].tolist()
        self._file.seek(start)
        try:
            return self.parse(parse_line(self._file.readline()))
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: changed while in use: {error}") from None


class JsonlFiles:
    """The rows of several files, as one sequence."""

    def __init__(self, paths, parse, cache_dir="out/cache", skip_bad=False):
        self.files = [JsonlFile(path, parse, cache_dir, skip_bad) for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])
        self.bad = sum(file.bad for file in self.files)
        self.prompts = sum((file.prompts for file in self.files), Counter())

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.files[which][i - (int(self.ends[which - 1]) if which else 0)]

    def hashes(self):
        """Return {path: SHA-256 of the content}."""
        return {str(file.path): file.sha256 for file in self.files}
