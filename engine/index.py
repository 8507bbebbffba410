"""Rows of JSONL files by number: an index on disk that all ranks build together and all map.

    byte ranges  ->  parts      a rank checks the lines that begin in its ranges of 64 MB
    parts        ->  columns    int64: where a row begins; on request its text ids

No Python object stands for a row, so memory does not grow with the rows. A second start verifies
the indices and reads no row. A damaged index is named and built again. The folder of indices must
be one that all ranks see.
"""
import hashlib
import json
import os
import secrets
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from engine.distributed import ALONE, together
from engine.jsonl import atomic, is_whole, lines_of, parse_line, seal, stamp

RANGE = 1 << 26                    # bytes of a file that one rank checks at a time
PROMPTS = 100                      # instructions that are kept where rows carry very many


def text_id(text):
    """Hash a text to a non-negative int64; equal texts have equal ids, composed or not (NFC).

    Of 20 million texts any two others share an id with a chance of 2e-5.
    """
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------- columns, built in parts

@dataclass
class Job:
    """A file of int64 columns to build from parts.

    make: k -> (columns of part k, what there is to say of it). join: [(columns' lengths, what was
    counted)] of all parts -> (what to add to the columns of each part, what to say of the file).
    """
    path: Path
    n_parts: int
    make: Callable
    join: Callable


def build(jobs, world):
    """Build the files of some jobs; the parts of all of them are shared out among the ranks."""
    token = world.gather_objects(secrets.token_hex(8))[0]
    parts = [(j, k) for j, job in enumerate(jobs) for k in range(job.n_parts)]
    mine = {(j, k): jobs[j].path.with_name(f"{jobs[j].path.stem}.{k}.{token}.tmp")
            for j, k in parts[world.rank::world.size]}

    def make():
        done = {}
        for (j, k), path in mine.items():
            columns, counts = jobs[j].make(k)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for column in columns:
                    file.write(np.asarray(column, dtype=np.int64).tobytes())
            done[j, k] = path, [len(column) for column in columns], counts
        return done

    try:
        done = {key: value for part in together(world, make) for key, value in part.items()}
        together(world, lambda: [
            _join(jobs[j], [done[j, k] for k in range(jobs[j].n_parts)])
            for j in range(world.rank, len(jobs), world.size)])
    finally:
        for path in mine.values():
            path.unlink(missing_ok=True)


def _join(job, parts):
    """Write the file of a job, column after column, from its parts (path, lengths, counts)."""
    add, about = job.join([part[1:] for part in parts])
    totals = np.sum([lengths for _, lengths, _ in parts], axis=0).tolist()
    with atomic(job.path, "wb") as file:
        for c in range(len(totals)):
            for (path, lengths, _), more in zip(parts, add):
                column = np.fromfile(path, np.int64, lengths[c], offset=8 * sum(lengths[:c]))
                if len(column) < lengths[c]:
                    raise OSError(f"{path} was cut while in use; start again")
                file.write((column + more[c]).tobytes())
    seal(job.path, {**about, "lengths": totals})


def read(path):
    """Return (what there is to say of it, int64 columns, mapped) of a file that `build` wrote."""
    about = json.loads(path.with_suffix(".json").read_bytes())["about"]
    lengths = about["lengths"]
    numbers = np.asarray(np.memmap(path, np.int64, "r")) if sum(lengths) else np.empty(0, int)
    return about, np.split(numbers, np.cumsum(lengths)[:-1])


# ---------------------------------------------------------------- one file

class JsonlFile:
    """One file of `JsonlFiles`: its index, and its rows by number.

    `sha256` is the hash of the content: of more than 64 MB, that of the hashes of its parts. `bad`
    is the number of lines that were left out, `prompts` a Counter of the rows' own prompts, `bare`
    the number of rows without one.
    """

    def __init__(self, path, parse, cache_dir, skip_bad, ids):
        self.path, self.parse, self.skip_bad, self.with_ids = Path(path), parse, skip_bad, ids
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        stat = self.path.stat()
        state = (f"7 {self.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} "
                 f"{parse.__name__} {skip_bad} {ids}")
        key = hashlib.sha256(os.fsencode(state)).hexdigest()[:24]
        self.index = Path(cache_dir) / f"{key}.idx"
        self.is_packed = self.path.name.lower().endswith(".gz")
        self.plain = self.index.with_suffix(".jsonl") if self.is_packed else self.path
        self._file = None

    def is_ready(self):
        """Tell whether the index is there, whole, and the unpacked file as long as it was."""
        return is_whole(self.index) and self.plain.is_file() \
            and stamp(self.plain) == read(self.index)[0]["stamp"]

    def unpack(self):
        """Write the lines of a .gz file beside its index."""
        with atomic(self.plain, "wb") as file:
            file.writelines(line for _, line in lines_of(self.path))

    def _check(self, k):
        """Check the lines that begin in range k -> columns, and what there is to say of them."""
        begin, end = k * RANGE, min((k + 1) * RANGE, self.plain.stat().st_size)
        columns = [array("q") for _ in range(5 if self.with_ids else 1)]
        counts, sha256 = {"bad": 0, "scored": 0, "bare": 0, "prompts": Counter()}, hashlib.sha256()
        with open(self.plain, "rb") as file:
            end_of_text = _end_of_text(file)
            start = file.seek(max(begin - 1, 0))
            start += len(file.readline()) if begin else 0
            while start < end and (line := file.readline()):       # no line: it has been cut
                sha256.update(line)
                if start < end_of_text:
                    self._check_line(line, start, columns, counts)
                start += len(line)
        counts["sha256"] = sha256.hexdigest()
        return columns, counts

    def _check_line(self, line, start, columns, counts):
        try:
            row = self.parse(parse_line(line))
        except ValueError as error:
            counts["bad"] += 1
            if self.skip_bad:
                return
            number = 1
            with open(self.plain, "rb") as file:
                while file.tell() < start and file.readline():
                    number += 1
            raise ValueError(f"{self.path}:{number}: {error}") from None
        columns[0].append(start)
        if self.with_ids:
            columns[1].append(text_id(row["query"]))
            columns[2].append(len(columns[4]))
            columns[3].append(len(row["pos"]))
            columns[4].extend(text_id(text) for text in row["pos"] + row["neg"])
        if isinstance(row, dict):
            counts["scored"] += "cosines" in row
            prompt = row.get("prompt")
            counts["bare"] += prompt is None
            if prompt is not None:
                _count(counts["prompts"], prompt, 1)

    def _join(self, parts):
        """Return what to add to the columns of each part, and what to say of the file."""
        add, prompts, rows, ids = [], Counter(), 0, 0
        sums = {key: sum(counts[key] for _, counts in parts) for key in ("bad", "scored", "bare")}
        for lengths, counts in parts:
            add.append([0, 0, ids, 0, 0])
            rows, ids = rows + lengths[0], ids + sum(lengths[4:])
            for prompt, count in counts["prompts"].items():
                _count(prompts, prompt, count)
        if not rows:
            raise ValueError(f"{self.path}: no usable line ({sums['bad']} bad ones)")
        digests = [counts["sha256"] for _, counts in parts]
        whole = digests[0] if len(digests) == 1 else \
            hashlib.sha256("".join(digests).encode()).hexdigest()
        return add, {**sums, "prompts": prompts, "sha256": whole,
                     "stamp": stamp(self.plain)}

    def open(self):
        """Map the index."""
        about, columns = read(self.index)
        self.sha256, self.bad, self.scored, self.bare = (
            about[key] for key in ("sha256", "bad", "scored", "bare"))
        self.prompts, self.offsets = Counter(about["prompts"]), columns[0]          # (rows,)
        if self.with_ids:          # of a row's texts: the first one's place, positives; all ids
            self.query_ids, self.first, self.n_pos, self.ids = columns[1:]

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
            raise ValueError(f"{self.path}: row {i + 1} changed while in use: {error}") from None


def _end_of_text(file):
    """Return where the last line ends that is not blank: blank lines after it are no mistake."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        if text := file.read(end - start).rstrip():
            return start + len(text)
        end = start
    return 0


def _count(prompts, prompt, count):
    """Count an instruction; of very many stay the most frequent, and the longest to be checked."""
    prompts[prompt] += count
    if len(prompts) > 10 * PROMPTS:
        longest = max(prompts, key=lambda text: len(text.encode("utf-8", "replace")))
        kept = dict(prompts.most_common(PROMPTS)) | {longest: prompts[longest]}
        prompts.clear()
        prompts.update(kept)


# ---------------------------------------------------------------- several files

class JsonlFiles:
    """The rows of several files, which need not fit into memory, as one sequence.

    parse: dict -> row, raises ValueError for a bad one. The first opening checks every line, all
    ranks of `world` together; they must all call. A .gz file is unpacked into `cache_dir`.
    ids: keep text ids as well, of rows {query, pos, neg}: engine/passages.py needs them.
    Raises ValueError "path:line: reason" for a bad line, unless `skip_bad` counts it.
    """

    def __init__(self, paths, parse, cache_dir="out/cache", skip_bad=False, ids=False, world=ALONE):
        def names_here():
            self.files = [JsonlFile(path, parse, cache_dir, skip_bad, ids) for path in paths]
            return [file.index for file in self.files]

        names = together(world, names_here)                # one rank may lack a file
        if any(other != names[0] for other in names):
            raise ValueError(f"{paths[0]} and others: not the same files on all ranks; put them on "
                             "a file system that all nodes see")
        different = list({file.index: file for file in self.files}.values())
        numbers = together(world, lambda: [
            i for i in range(world.rank, len(different), world.size)
            if not different[i].is_ready()])
        todo = [different[i] for part in numbers for i in part]
        packed = [file for file in todo if file.is_packed]
        try:
            together(world, lambda: [f.unpack() for f in packed[world.rank::world.size]])
            build([Job(f.index, max(1, -(-f.plain.stat().st_size // RANGE)), f._check, f._join)
                   for f in todo], world)
        except (ValueError, OSError):
            for file in packed:
                file.plain.unlink(missing_ok=True)
            raise
        for file in self.files:
            file.open()
        self.starts = np.cumsum([0, *map(len, self.files)])
        self.bad, self.bare = (sum(getattr(f, key) for f in self.files) for key in ("bad", "bare"))
        self.is_scored = sum(file.scored for file in self.files) == len(self)
        self.prompts = sum((file.prompts for file in self.files), Counter())
        self.hashes = [file.sha256 for file in self.files]

    def __len__(self):
        return int(self.starts[-1])

    def place(self, i):
        """Return (number of the file, number of the row in it) of row `i`."""
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        return which, i - int(self.starts[which])

    def __getitem__(self, i):
        which, i = self.place(i)
        return self.files[which][i]
