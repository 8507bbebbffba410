"""JSONL files: read them with clear errors, and write them safely.

One JSON object a line, UTF-8, plain or .gz; .ndjson and .json are taken for the same. A byte order
mark is passed over. A bad line is named by file and line. engine/index.py reads rows by number.
`atomic` writes a file aside, syncs and renames it. `seal` notes the hash of a file that is to be
used again, and `is_whole` compares.
"""
import contextlib
import gzip
import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path

from tqdm import tqdm


def check_name(out, inputs=()):
    """Raise ValueError for a name that `atomic` cannot write, or that is one of `inputs`."""
    if str(out).lower().endswith(".gz"):
        raise ValueError(f"{out}: what is written is not packed; leave .gz out of the name")
    if out and Path(out).is_dir():
        raise ValueError(f"{out}: a folder has this name; name a file")
    if Path(out).resolve() in [Path(path).resolve() for path in inputs]:
        raise ValueError(f"{out}: the input would be replaced; name another file")


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file to write; it appears under its name when it is whole, and not at all on an error.

    mode: "w" (UTF-8, "\\n" as line end) or "wb". The folder is made if it is missing. What a link
    leads to is written, and a device, /dev/null say, as it stands. Raises ValueError for a name
    that ends in .gz: nothing is packed.
    """
    check_name(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")    # containers share pids
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if path.exists() and not path.is_file():
        with open(path, mode, **options) as file:
            yield file
        return
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sha256_of(path):
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path, about=None):
    """Write what there is to say of a file beside it, as .json: size, time, hash, and a seal."""
    note = {"about": about, "stamp": stamp(path), "sha256": sha256_of(path)}
    with atomic(Path(path).with_suffix(".json")) as file:
        json.dump({**note, "seal": _seal_of(note)}, file)


def is_whole(path):
    """Tell whether a file is as it was sealed; name one that is not: it is built again.

    A file of the same size and time is not read.
    """
    try:
        note = json.loads(Path(path).with_suffix(".json").read_bytes())
        if note.pop("seal") == _seal_of(note) and (
                note["stamp"] == stamp(path) or note["sha256"] == sha256_of(path)):
            return True
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    if Path(path).is_file():
        tqdm.write(f"{path} is damaged or unfinished; it is built again")
    return False


def stamp(path):
    """Return [size, time of the last change in ns] of a file."""
    return [Path(path).stat().st_size, Path(path).stat().st_mtime_ns]


def _seal_of(note):
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()


def to_line(row):
    """Return a row as one line of JSONL, bytes; a lone surrogate becomes "?"."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def write_jsonl(path, rows):
    """Write rows (dicts) as JSONL; return their number."""
    count = 0
    with atomic(path, "wb") as file:
        for count, row in enumerate(rows, 1):
            file.write(to_line(row))
    return count


def is_json(path):
    """Tell whether a file's name says JSONL, packed or not: x.jsonl, x.NDJSON, x.json.gz."""
    name = Path(path).name.lower().removesuffix(".gz")
    return name.endswith((".jsonl", ".ndjson", ".json"))


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
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            raise ValueError(f"key {key!r} must be {' or '.join(names)}, not "
                             f"{type(row[key]).__name__}")
    for key in ("title", "lang", "split") if required else ():      # optional everywhere
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"key {key!r} must be str, not {type(row[key]).__name__}")
    return row


# ---------------------------------------------------------------- whole files

def lines_of(path, may_be_pipe=False):
    """Yield (number, line as bytes) of a plain or .gz file, without blank lines at its end.

    Raises FileNotFoundError by name, and ValueError "path:line: reason" where a .gz file is damaged
    or cut.
    """
    if not Path(path).is_file() and not (may_be_pipe and Path(path).is_fifo()):
        raise FileNotFoundError(f"{path}: no such file")
    number, blank = 0, []
    try:
        with (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from blank
                    yield number, line
                    blank = []
                else:
                    blank.append((number, line))       # bad only if another line follows
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read to the end: {error}") from error


def read_jsonl(path, required=None, check=None):
    """Yield the rows (dicts) of a JSONL file; ValueError "path:line: reason" for a bad line.

    required: {key: type or tuple of types} that every row must have. check(row) may raise, too.
    """
    for number, line in lines_of(path):
        try:
            row = parse_line(line, required)
            if check:
                check(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        yield row


def read_object(path):
    """Return the JSON object that a whole file is; ValueError by its name if it is none."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no JSON object: {error}") from None


def write_object(path, value):
    """Write a JSON object as a whole file."""
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_texts(path):
    """Return the texts of a file: its {"text"} rows if its name says JSON, else its lines.

    Blank lines at the end are no texts.
    """
    if is_json(path):
        return [row["text"] for row in read_jsonl(path, {"text": str})]
    texts = []
    for number, line in lines_of(path, may_be_pipe=True):      # it is read once
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte "
                             f"{error.start})") from None
        if "\x00" in text:
            raise ValueError(f"{path}:{number}: holds a zero byte: UTF-16, or no text")
        texts.append(text.rstrip("\r\n"))
    return texts
