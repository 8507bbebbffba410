"""Rows of JSONL files by number: an index on disk that all ranks build together and all map.

    byte ranges  ->  parts      a rank checks the lines that begin in its ranges of 64 MB
    parts        ->  columns    int64: where a row begins, its line; on request its text ids

No Python object stands for a row, so memory does not grow with the rows. A second start verifies
the index, each rank a share of it, and reads no row. A damaged index is named and built again. The
folder of indices must be one that all ranks see.
"""
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm

from engine.jsonl import atomic, parse_line

RANGE = 1 << 26                    # bytes of a file that one rank checks at a time
OLD = 3600                         # seconds after which a part of another build is removed
PROMPTS = 100                      # different instructions that are counted


class Alone:
    """One process as a world of its own; with several, engine.distributed.World is in its place."""
    rank, size, is_main = 0, 1, True

    def gather_objects(self, value):
        """Return [value]."""
        return [value]


ALONE = Alone()


def together(world, work):
    """Return the list of every rank's `work()`; all ranks must call, and wait for each other.

    A ValueError or OSError of one rank is raised on all of them, so that none waits for ever.
    """
    try:
        value = work()
    except (ValueError, OSError) as error:
        value = error
    values = world.gather_objects(value)
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values


def text_id(text):
    """Hash a text to a non-negative int64; equal ids mean equal texts, composed or not (NFC)."""
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------- columns, built in parts

@dataclass
class Job:
    """A file of int64 columns to build from parts.

    make: k -> (columns of part k, what there is to say of it, a dict). A dict with "error" ends the
    work. join: (the dicts, the lengths of all columns, each in order of k) -> (what to add to the
    columns of each part, what to say of the file). `join` raises ValueError for an error in a part.
    """
    path: Path
    n_parts: int
    make: Callable
    join: Callable


def build(jobs, world):
    """Build the files of some jobs; the parts of all of them are shared out among the ranks."""
    token = world.gather_objects(os.getpid())[0]
    parts = [(j, k) for j, job in enumerate(jobs) for k in range(job.n_parts)]
    mine = parts[world.rank::world.size]

    def aside(j, k=""):
        return jobs[j].path.with_name(f"{jobs[j].path.stem}.{k}.{token}.tmp")

    together(world, lambda: _sweep({job.path.parent for job in jobs}) if world.is_main else None)

    def make():
        seen = {}
        for j, k in mine:
            columns, said = jobs[j].make(k)
            aside(j, k).parent.mkdir(parents=True, exist_ok=True)
            with open(aside(j, k), "wb") as file:
                for column in columns:
                    file.write(np.asarray(column, dtype=np.int64).tobytes())
            seen[j, k] = said, [len(column) for column in columns]
            if "error" in said:
                break                              # `join` finds it
        return seen

    try:
        seen = {key: value for part in together(world, make) for key, value in part.items()}
        plans = []
        for j, job in enumerate(jobs):
            of_job = [seen[j, k] for k in range(job.n_parts) if (j, k) in seen]
            lengths = [length for _, length in of_job]
            plans.append((lengths, *job.join([said for said, _ in of_job], lengths)))
        together(world, lambda: [open(aside(j), "wb").close() for j in range(len(jobs))
                                 if world.is_main])
        placed = together(world, lambda: {(j, k): _place(aside(j, k), aside(j), k, *plans[j][:2])
                                          for j, k in mine})
        digests = {key: value for part in placed for key, value in part.items()}
        together(world, lambda: [
            _finish(job.path, aside(j), plans[j], [digests[j, k] for k in range(job.n_parts)])
            for j, job in enumerate(jobs) if world.is_main])
    except BaseException:
        for path in [aside(j, k) for j, k in mine] + [aside(j) for j in range(len(jobs))]:
            path.unlink(missing_ok=True)
        raise


def _sweep(folders):
    """Remove the parts that builds left behind which were killed."""
    for path in [path for folder in folders for path in folder.glob("*.tmp")]:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()


def _slices(lengths, k):
    """Return the slice of part k in a file's int64 numbers, for each column."""
    lengths = np.array(lengths, dtype=np.int64)                             # (parts, columns)
    ends = lengths.sum(0).cumsum()
    starts = ends - lengths.sum(0) + lengths[:k].sum(0)
    return [slice(int(a), int(a + n)) for a, n in zip(starts, lengths[k])]


def _place(part, target, k, lengths, add):
    """Copy part k into the file of all; return its SHA-256 there."""
    numbers, sha256, start = np.fromfile(part, np.int64), hashlib.sha256(), 0
    with open(target, "r+b") as file:
        for where, n, more in zip(_slices(lengths, k), lengths[k], add[k]):
            raw = (numbers[start:start + n] + more).tobytes()
            file.seek(8 * where.start)
            file.write(raw)
            sha256.update(raw)
            start += n
        file.flush()
        os.fsync(file.fileno())
    part.unlink()
    return sha256.hexdigest()


def _finish(path, aside, plan, digests):
    """Give the file its name, and write beside it what there is to say of it."""
    lengths, _, about = plan
    os.replace(aside, path)
    with atomic(path.with_suffix(".json")) as file:
        json.dump({**about, "lengths": lengths, "digests": digests}, file)


def about_of(path, world):
    """Return what the file beside `path` says of it, if this rank's share of `path` is whole."""
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        lengths, digests = about["lengths"], about["digests"]
        total = int(np.sum(lengths))
        if path.stat().st_size != 8 * total or len(lengths) != len(digests):
            return None
        numbers = np.memmap(path, np.int64, "r") if total else np.empty(0, np.int64)
        for k in range(world.rank, len(lengths), world.size):
            sha256 = hashlib.sha256()
            for where in _slices(lengths, k):
                sha256.update(numbers[where])
            if sha256.hexdigest() != digests[k]:
                return None
        return about
    except (OSError, ValueError, LookupError, TypeError):
        return None


def columns_of(path):
    """Return the memory-mapped int64 columns of a file that `build` wrote."""
    lengths = np.sum(json.loads(path.with_suffix(".json").read_bytes())["lengths"], axis=0)
    numbers = np.asarray(np.memmap(path, np.int64, "r")) if lengths.sum() else np.empty(0, int)
    return np.split(numbers, np.cumsum(lengths)[:-1])


# ---------------------------------------------------------------- one file

class JsonlFile:
    """One file of `JsonlFiles`: its index, and its rows by number.

    `sha256` is the hash of the content: of more than 64 MB, that of the hashes of its ranges. `bad`
    is the number of lines that were left out, `prompts` a Counter of the rows' own prompts.
    """

    def __init__(self, path, parse, cache_dir, skip_bad, ids):
        self.path, self.parse, self.skip_bad, self.with_ids = Path(path), parse, skip_bad, ids
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        stat = self.path.stat()
        state = (f"3 {self.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} "
                 f"{parse.__name__} {skip_bad} {ids}")
        key = hashlib.sha256(os.fsencode(state)).hexdigest()[:24]
        self.index = Path(cache_dir) / f"{key}.idx"
        self.is_packed = self.path.name.lower().endswith(".gz")
        self.plain = self.index.with_suffix(".jsonl") if self.is_packed else self.path
        self._file = None

    def about(self, world):
        """Return what the index says, None if it or the unpacked file is missing or damaged."""
        about = about_of(self.index, world)
        size = self.plain.stat().st_size if self.plain.is_file() else -1
        return about if about and about.get("size") == size else None

    def unpack(self):
        """Write the content of a .gz file beside its index."""
        try:
            with gzip.open(self.path) as source, atomic(self.plain, "wb") as target:
                shutil.copyfileobj(source, target)
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{self.path}: cannot be unpacked: {error}") from error

    def job(self):
        """Return the `Job` that builds the index."""
        return Job(self.index, max(1, -(-self.plain.stat().st_size // RANGE)), self._check,
                   self._join)

    def _check(self, k):
        """Check the lines that begin in range k -> columns, and what there is to say of them."""
        begin, end = k * RANGE, min((k + 1) * RANGE, self.plain.stat().st_size)
        columns = [array("q") for _ in range(6 if self.with_ids else 2)]
        said = {"lines": 0, "blank": 0, "bad": 0, "scored": 0, "prompts": Counter(),
                "text": False, "bytes": end - begin}
        with open(self.plain, "rb") as file:
            said["sha256"] = _sha256(file, begin, end)
            file.seek(max(begin - 1, 0))
            start = begin - 1 + len(file.readline()) if begin else 0
            file.seek(start)
            for line in file:
                if start >= end:
                    break
                said["lines"] += 1
                if not line.strip():
                    said["blank"] += 1             # bad only if another line follows
                else:
                    self._check_line(line, start, columns, said)
                if "error" in said:
                    break
                start += len(line)
        return columns, said

    def _check_line(self, line, start, columns, said):
        blank, said["blank"], said["text"] = said["blank"], 0, True
        try:
            if blank:
                said["bad"] += blank
                if not self.skip_bad:
                    said["lines"] -= blank         # the first of the blank ones
                    raise ValueError("blank line")
            row = self.parse(parse_line(line))
        except ValueError as error:
            said["bad"] += 1
            if not self.skip_bad:
                said["error"] = str(error)
            return
        numbers = [start, said["lines"]]
        if self.with_ids:
            numbers += [text_id(row["query"]), len(columns[5]), len(row["pos"])]
            columns[5].extend(text_id(text) for text in row["pos"] + row["neg"])
        for column, number in zip(columns, numbers):
            column.append(number)
        if isinstance(row, dict):
            said["scored"] += "cosines" in row
            _count(said["prompts"], row.get("prompt"), 1)

    def _join(self, parts, lengths):
        """Raise the first error; return what to add to each part, and what to say of the file."""
        rows = lines = ids = bad = blank = 0
        add, prompts = [], Counter()
        for said, length in zip(parts, lengths):
            if said["text"] and blank:
                if not self.skip_bad:
                    raise ValueError(f"{self.path}:{lines - blank + 1}: blank line")
                bad, blank = bad + blank, 0
            if "error" in said:
                raise ValueError(f"{self.path}:{lines + said['lines']}: {said['error']}")
            add.append([0, lines, 0, ids, 0, 0][:len(length)])
            lines, blank = lines + said["lines"], blank + said["blank"]
            rows, bad, ids = rows + length[0], bad + said["bad"], ids + sum(length[5:])
            for prompt, count in said["prompts"].items():
                _count(prompts, prompt, count)
        if not rows:
            raise ValueError(f"{self.path}: no usable line ({bad} bad ones)")
        digests = [said["sha256"] for said in parts]
        whole = digests[0] if len(digests) == 1 else \
            hashlib.sha256("".join(digests).encode()).hexdigest()
        return add, {"rows": rows, "bad": bad, "size": sum(said["bytes"] for said in parts),
                     "sha256": whole, "prompts": prompts, "ids": ids,
                     "scored": sum(said["scored"] for said in parts)}

    def open(self):
        """Map the index; return the file."""
        about = json.loads(self.index.with_suffix(".json").read_bytes())
        self.sha256, self.bad, self.scored = about["sha256"], about["bad"], about["scored"]
        self.prompts, self.n_ids = Counter(about["prompts"]), about["ids"]
        columns = columns_of(self.index)
        self.offsets, self.lines = columns[:2]                              # (rows,) each
        if self.with_ids:          # of a row's texts: the first one's place, positives; all ids
            self.query_ids, self.first, self.n_pos, self.ids = columns[2:]
        return self

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        """Return row `i`, parsed; the file is read at its place only."""
        if self._file is None:
            self._file = open(self.plain, "rb")
        self._file.seek(int(self.offsets[i]))
        try:
            return self.parse(parse_line(self._file.readline()))
        except ValueError as error:
            raise ValueError(f"{self.path}:{self.lines[i]}: changed while in use: {error}") \
                from None


def _sha256(file, begin, end):
    """Return the SHA-256 of a range of bytes."""
    sha256 = hashlib.sha256()
    file.seek(begin)
    while begin < end and (block := file.read(min(1 << 20, end - begin))):
        sha256.update(block)
        begin += len(block)
    return sha256.hexdigest()


def _count(prompts, prompt, count):
    if prompt is not None and (prompt in prompts or len(prompts) < PROMPTS):
        prompts[prompt] += count


# ---------------------------------------------------------------- several files

class JsonlFiles:
    """The rows of several files, which need not fit into memory, as one sequence.

    parse: dict -> row, raises ValueError for a bad one. The first opening checks every line, all
    ranks of `world` together; they must all call. A .gz file is unpacked into `cache_dir` once.
    ids: keep text ids as well, of rows {query, pos, neg}: engine/passages.py needs them.
    Raises ValueError "path:line: reason" for a bad line, unless `skip_bad` counts it.
    """

    def __init__(self, paths, parse, cache_dir="out/cache", skip_bad=False, ids=False, world=ALONE):
        self.files = [JsonlFile(path, parse, cache_dir, skip_bad, ids) for path in paths]
        whole = together(world, lambda: [bool(file.about(world)) for file in self.files])
        todo = {file.index: file for file, *of_ranks in zip(self.files, *whole)
                if not all(of_ranks)}
        todo = list(todo.values())                 # a file may be given twice
        for file in todo:
            if world.is_main and file.index.is_file():
                tqdm.write(f"{file.path}: its index {file.index} is damaged; it is built again")
        packed = [file for file in todo if file.is_packed]
        try:
            together(world, lambda: [f.unpack() for f in packed[world.rank::world.size]])
            if todo:
                build([file.job() for file in todo], world)
        except (ValueError, OSError):
            for file in packed:
                file.plain.unlink(missing_ok=True)
            raise
        together(world, lambda: [file.open() for file in self.files] and None)
        self.ends = np.cumsum([len(file) for file in self.files])
        self.bad = sum(file.bad for file in self.files)
        self.is_scored = sum(file.scored for file in self.files) == len(self)
        self.prompts = sum((file.prompts for file in self.files), Counter())

    def __len__(self):
        return int(self.ends[-1])

    def place(self, i):
        """Return (number of the file, number of the row in it) of row `i`."""
        which = int(np.searchsorted(self.ends, i, side="right"))
        return which, i - (int(self.ends[which - 1]) if which else 0)

    def __getitem__(self, i):
        which, i = self.place(i)
        return self.files[which][i]

    def hashes(self):
        """Return {path: SHA-256 of the content}."""
        return {str(file.path): file.sha256 for file in self.files}
