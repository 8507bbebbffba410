"""Data: formats, files larger than memory, order of examples, batches, mined candidates.

One example a line, JSONL or JSONL.gz, UTF-8, in the formats that users already have:

    text            {"text"}
    pairs           {"instruction"?, "input", "output"}  or  {"query", "pos", "prompt"?}
    retrieval, clr, classification    {"query", "pos": [..], "neg": [..]?, "prompt"?}
    sts             {"sentence1", "sentence2", "score"}
    a collection    corpus.jsonl, queries.jsonl, qrels.tsv (the BEIR form)

PAPER Sec. 3.1, Table 10, Table 11. A bad line is named by file and number. The order of examples is
a pure function of (seed, epoch, position), and the task of a step one of (seed, step), the same on
every rank: a resumed run needs no more than the number of its next step, on any number of ranks.
UNSPECIFIED: the instruction template; `format_query` is the one place that knows it.
"""
import gzip
import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PROMPTS = {                        # what a query of each task asks for, unless its row says so
    "retrieval": "Find",
    "clr": "Find",
    "classification": "Name the topic",
    "sts": "",
    "bitext": "",
}


def format_query(text, instruction=None):
    """Put an instruction in front of a query; passages never carry one (PAPER Sec. 3.1.2)."""
    return f"{instruction}: {text}" if instruction else text


def format_sft(instruction, text):
    """Write the prompt of an SFT example; the output follows it (PAPER Sec. 3.1.1)."""
    return format_query(text, instruction) + "\n\n"


# ---------------------------------------------------------------- reading

def read_jsonl(path, required=None, skip_bad=False, on_bad=None):
    """Yield the rows (dicts) of a JSONL or JSONL.gz file.

    required: {key: type or tuple of types} that every row must have. A line that is not a JSON
    object with these keys raises ValueError "path:line: reason", or with `skip_bad` is left out and
    reported to `on_bad(message)`. Blank lines are bad lines. Raises FileNotFoundError by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    number = 0
    try:
        with (gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse_line(line, required)
                except ValueError as error:
                    _bad(f"{path}:{number}: {error}", skip_bad, on_bad)
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read to the end: {error}") from error


def _bad(message, skip_bad, on_bad):
    if not skip_bad:
        raise ValueError(message)
    if on_bad:
        on_bad(message)


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _no_key_twice(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key comes twice in {[key for key, _ in pairs][:8]}")
    return row


_JSON = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_key_twice)


def parse_line(line, required=None):
    """Parse one line (bytes) to a dict; ValueError with the reason if it is not what it must be.

    A byte order mark is passed over; a lone surrogate, which UTF-8 cannot hold, becomes "?".
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
            raise ValueError(f"key {key!r} is missing, there are {sorted(row)[:8]}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise ValueError(f"key {key!r} must be {_name(kind)}, not {type(row[key]).__name__}")
    for key in ("title", "lang", "split") if required else ():      # read where they are there
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"key {key!r} must be str, not {type(row[key]).__name__}")
    return row


def _name(kind):
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


def _text(row, key):
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"key {key!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"key {key!r} is empty")
    return value


def _texts(row, key):
    values = row.get(key)
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list):
        raise ValueError(f"key {key!r} must be a list of strings, not {type(values).__name__}")
    return [_text({key: value}, key) for value in values]


def parse_text(row):
    """Return the document of a {"text"} row."""
    return _text(row, "text")


def parse_pair(row):
    """Return {query, pos, neg, prompt} of a row in any of the pair and retrieval formats.

    pos is never empty, neg may be; prompt is None where the row says nothing.
    """
    if "input" in row or "output" in row:
        query, pos, prompt = _text(row, "input"), [_text(row, "output")], row.get("instruction")
    else:
        query, pos, prompt = _text(row, "query"), _texts(row, "pos"), row.get("prompt")
    if not pos:
        raise ValueError("key 'pos' is an empty list")
    if not isinstance(prompt, (str, type(None))):
        raise ValueError(f"the prompt must be a string, not {type(prompt).__name__}")
    return {"query": query, "pos": pos, "neg": _texts(row, "neg") if row.get("neg") else [],
            "prompt": prompt}


def parse_sts(row):
    """Return {sentence1, sentence2, score} of an STS row; only the order of scores counts."""
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 3e38:
        raise ValueError(f"key 'score' must be a finite number (float32), not {str(score)[:40]}")
    return {"sentence1": _text(row, "sentence1"), "sentence2": _text(row, "sentence2"),
            "score": float(score)}


PARSERS = {"text": parse_text, "pairs": parse_pair, "retrieval": parse_pair, "clr": parse_pair,
           "classification": parse_pair, "sts": parse_sts}


class JsonlFile:
    """Random access to the rows of a file that need not fit into memory.

    The first opening checks every line and writes an index of byte offsets next to the other
    caches (`cache_dir`); a .gz file is unpacked there once. Later openings map the index. With
    `skip_bad` the index leaves bad lines out, and `bad` counts them.
    """

    def __init__(self, path, kind, cache_dir="out/cache", skip_bad=False):
        if kind not in PARSERS:
            raise ValueError(f"kind {kind!r} is unknown; choose one of {', '.join(PARSERS)}")
        self.path, self.parse = Path(path), PARSERS[kind]
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        stat = self.path.stat()
        self.state = f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {kind} {skip_bad}"
        key = hashlib.sha256(os.fsencode(self.state)).hexdigest()[:24]
        self.plain, index = self.path, Path(cache_dir) / f"{key}.idx"
        if self.path.suffix == ".gz":
            self.plain = index.with_suffix(".jsonl")
        if not self._is_whole(index):
            self._build(index, skip_bad)
        self.offsets = np.memmap(index, np.int64, "r").reshape(-1, 2)       # (rows + 1, 2)
        self.bad = int(self.offsets[-1, 1])
        self._file = None

    def _is_whole(self, index):
        """Tell whether an index is there and reaches the end of its file."""
        if not index.is_file() or index.stat().st_size < 32 or index.stat().st_size % 16 \
                or not self.plain.is_file():
            return False
        return int(np.memmap(index, np.int64, "r")[-2]) == self.plain.stat().st_size

    def _build(self, index, skip_bad):
        index.parent.mkdir(parents=True, exist_ok=True)
        if self.plain != self.path:
            part = Path(f"{self.plain}.{os.getpid()}")
            try:
                with gzip.open(self.path) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
            except (EOFError, zlib.error, OSError) as error:
                part.unlink(missing_ok=True)
                raise ValueError(f"{self.path}: cannot be unpacked: {error}") from error
            os.replace(part, self.plain)
        part = Path(f"{index}.{os.getpid()}")
        try:
            with open(self.plain, "rb") as file, open(part, "wb") as target:
                rows, bad, at = 0, 0, 0
                for number, line in enumerate(file, 1):
                    try:
                        self.parse(parse_line(line))
                        target.write(struct.pack("=2q", at, number))
                        rows += 1
                    except ValueError as error:
                        _bad(f"{self.path}:{number}: {error}", skip_bad, None)
                        bad += 1
                    at += len(line)
                target.write(struct.pack("=2q", at, bad))                   # the end, and a count
            if not rows:
                raise ValueError(f"{self.path}: no usable line ({bad} bad ones)")
            os.replace(part, index)
        except (ValueError, OSError):
            part.unlink(missing_ok=True)
            if self.plain != self.path:
                self.plain.unlink()
            raise

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        """Return row `i`, parsed; the file is read at its place only."""
        if self._file is None:
            self._file = open(self.plain, "rb")
        at, number = self.offsets[i].tolist()
        self._file.seek(at)
        try:
            return self.parse(parse_line(self._file.readline()))
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: changed while in use: {error}") from None


class Rows:
    """The rows of several files of one kind, as one sequence."""

    def __init__(self, paths, kind, cache_dir="out/cache", skip_bad=False):
        if not paths:
            raise ValueError(f"no file of kind {kind!r} is given")
        self.files = [JsonlFile(path, kind, cache_dir, skip_bad) for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])
        self.bad = sum(file.bad for file in self.files)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.files[which][i - (int(self.ends[which - 1]) if which else 0)]


@dataclass
class Collection:
    """A retrieval collection: rows with ids, and qrels {query id: {document id: relevance}}.

    split: the name of the qrels, None where rows name it. without_self: a ranking leaves out the
    document whose id is the query's own.
    """
    name: str
    corpus: list
    queries: list
    qrels: dict
    split: str | None = None
    without_self: bool = False


def document_text(row):
    """Return a document as it is embedded: its title, one space and its text, as mteb joins them.

    >>> document_text({"title": "Cats", "text": "They purr."}), document_text({"text": "No title."})
    ('Cats They purr.', 'No title.')
    """
    return f"{row.get('title') or ''} {row['text']}".strip()


def read_with_ids(path):
    """Yield the rows of a corpus.jsonl or queries.jsonl; BEIR's `_id` is taken for `id`.

    Raises ValueError by file and line for an id that is missing, no string, or there twice.
    """
    seen = set()
    for number, row in enumerate(read_jsonl(path, {"text": str}), 1):
        name = next((name for name in ("id", "_id") if name in row), None)
        if name is None:
            raise ValueError(f"{path}:{number}: no id or _id; the keys are {sorted(row)[:8]}")
        key = row[name]
        if not isinstance(key, str):
            raise ValueError(f"{path}:{number}: {name} {key!r} must be a string, not "
                             f"{type(key).__name__}")
        if key in seen:
            raise ValueError(f"{path}:{number}: id {key!r} comes twice")
        seen.add(key)
        yield {**row, "id": key}


def find_packed(path):
    """Return a file or its .gz, whichever is there; FileNotFoundError by name without either."""
    for found in (Path(path), Path(f"{path}.gz")):
        if found.is_file():
            return found
    raise FileNotFoundError(f"{path}: no such file (nor {Path(path).name}.gz)")


def find_qrels(directory, split=None):
    """Return (file, split or None) of a folder's qrels.tsv or, as in BEIR, qrels/SPLIT.tsv.

    Of several splits, the one that is named or the first of HELD_OUT.
    """
    files = {path.name.removesuffix(".gz").removesuffix(".tsv"): path
             for path in sorted((directory / "qrels").glob("*"))
             if path.name.endswith((".tsv", ".tsv.gz"))}
    whole = next((path for path in (directory / "qrels.tsv", directory / "qrels.tsv.gz")
                  if path.is_file()), None)
    if whole and split not in files:
        return whole, None
    name = split or next((name for name in HELD_OUT if name in files), None)
    if name not in files:
        raise FileNotFoundError(f"{directory / 'qrels.tsv'}: no such file, nor qrels/"
                                f"{name or 'test'}.tsv; the splits in qrels/ are {sorted(files)}")
    return files[name], name


def read_qrels(path):
    """Yield (line number, query id, document id, score) of a qrels file, plain or .gz.

    Three columns and a header or none, or TREC's four; blank lines at the end are passed over.
    """
    for number, line in lines_of(path):
        try:
            cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        if number == 1 and cells[-1].strip() == "score":
            continue
        try:
            query, document, score = cells[0], cells[-2], float(cells[-1])
        except (ValueError, IndexError):
            raise ValueError(f"{path}:{number}: query-id, corpus-id and a number are needed, not "
                             f"{str(line[:80])[2:-1]}") from None
        if not math.isfinite(score):
            raise ValueError(f"{path}:{number}: the score {score} is not finite")
        yield number, query, document, score


def join_qrels(path, queries, documents, dangling):
    """Return {query id: {document id: relevance}} of a file; `queries`, `documents` are known ids.

    dangling, for a line that names a missing one: "refuse", "skip", or "count" (a missing document
    stays judged, as in mteb: no ranking ever has it). Skipped and counted lines give a warning.
    """
    qrels, missing = {}, []
    for number, query, document, score in read_qrels(path):
        unknown = [f"unknown {kind} {key!r}" for kind, key, known in (
            ("query", query, queries), ("document", document, documents)) if key not in known]
        if unknown:
            missing.append(f"line {number}: {' and '.join(unknown)}")
            if dangling == "refuse":
                raise ValueError(f"{path}:{number}: {' and '.join(unknown)}; dangling=skip leaves "
                                 "such lines out, dangling=count takes them as never found")
            if dangling == "skip" or query not in queries:
                continue
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{path}:{number}: query {query!r} and document {document!r} have "
                             f"two scores, {qrels[query][document]} and {score}")
    if missing:
        done = "left out" if dangling == "skip" else "counted as never found"
        warnings.warn(f"{path}: {len(missing)} lines {done}; {missing[0]}", stacklevel=3)
    return qrels


def load_collection(directory, split=None, dangling="refuse", ignore_identical_ids=None):
    """Read the corpus.jsonl, queries.jsonl and qrels of a folder, each plain or .gz.

    split: one of qrels/SPLIT.tsv, or the queries whose row says `"split": split`. Queries without a
    judged document are left out, unless their row has `answers`. dangling: see `join_qrels`.
    ignore_identical_ids: leave the document with a query's own id out of its ranking; None: if such
    a pair has equal texts and is not judged relevant, as in ArguAna. Raises ValueError by file and
    line.
    """
    if dangling not in ("refuse", "skip", "count"):
        raise ValueError(f"dangling {dangling!r} is unknown; choose refuse, skip or count")
    directory = Path(directory)
    corpus = list(read_with_ids(find_packed(directory / "corpus.jsonl")))
    queries = list(read_with_ids(find_packed(directory / "queries.jsonl")))
    texts, qrels, of_file = {row["id"]: row["text"] for row in corpus}, {}, None
    try:
        path, of_file = find_qrels(directory, split)
        qrels = join_qrels(path, {row["id"] for row in queries}, texts, dangling)
    except FileNotFoundError:
        if not any(row.get("answers") for row in queries):
            raise
    queries = [row for row in queries if (qrels.get(row["id"]) or row.get("answers"))
               and (of_file or not split or row.get("split") == split)]
    if not queries:
        raise ValueError(f"{directory}: no query{f' of split {split!r}' if split else ''} has a "
                         "judged document")
    if ignore_identical_ids is None:
        same = [row["id"] for row in queries if texts.get(row["id"]) == row["text"]
                and qrels.get(row["id"], {}).get(row["id"], 0) <= 0]
        if ignore_identical_ids := bool(same):
            warnings.warn(f"{directory}: {len(same)} queries are documents too, {same[0]!r} first; "
                          "each is left out of its own ranking (ignore_identical_ids=false keeps "
                          "them)", stacklevel=2)
    return Collection(directory.name, corpus, queries, qrels, of_file, ignore_identical_ids)


# ---------------------------------------------------------------- order: a pure function

def _mix(x, key):
    """Hash uint64 arrays (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(positions, n, seed):
    """Map endless positions (int64 array) to example indices: each epoch is a permutation of n.

    A four-round Feistel network on the epoch's number and the place in it: a permutation that is
    computed where it is asked, so that it costs no memory for a billion examples.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    epoch, x = positions // np.uint64(n), positions % np.uint64(n)
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    key = _mix(epoch, seed)
    todo = np.ones(x.shape, dtype=bool)
    while todo.any():                                  # walk the cycle until it falls below n
        left, right = x >> np.uint64(half), x & low
        for number in range(4):
            left, right = right, left ^ (_mix(right ^ key, number) & low)
        x = np.where(todo, (left << np.uint64(half)) | right, x)
        todo = x >= n
    return x.astype(np.int64)


def task_of_step(steps, weights, seed):
    """Return the task number of each step (int64 array), drawn by weight from (seed, step) only."""
    edges = np.cumsum(np.asarray(weights, dtype=np.float64))
    key = int(_mix(np.array([seed], dtype=np.uint64), 0x7A5C)[0])   # near seeds, far draws
    draw = _mix(np.asarray(steps, dtype=np.uint64), key) / 2.0 ** 64
    return np.searchsorted(edges / edges[-1], draw, side="right").clip(max=len(weights) - 1)


def text_id(text):
    """Hash a text to a non-negative int64; equal ids mean equal texts."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------- pretraining: a token stream

class TokenStream:
    """All documents of some text files as one memory-mapped stream of uint32 ids.

    Documents are separated by the end-of-text id. Window w of an epoch is `block` + 1 ids; the
    windows of later epochs start elsewhere, so that text is not always cut at the same places.
    """

    def __init__(self, rows, tokenizer, path, seed=0):
        path = Path(path)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(f"{path}.{os.getpid()}")
            with open(part, "wb") as file:
                for start in range(0, len(rows), 1000):
                    texts = [rows[i] for i in range(start, min(start + 1000, len(rows)))]
                    for ids in tokenizer.encode_batch(texts):
                        np.array(ids + [tokenizer.eos_id], dtype=np.uint32).tofile(file)
            os.replace(part, path)
        self.ids, self.seed = np.memmap(path, dtype=np.uint32, mode="r"), seed

    def windows(self, positions, block):
        """Return (len(positions), block + 1) int64 ids of these places in the endless order."""
        n = (len(self.ids) - 1) // block - 1
        if n < 1:
            raise ValueError(f"{len(self.ids)} tokens of text are too few for blocks of {block}")
        at = shuffled(positions, n, self.seed)
        shift = _mix(np.asarray(positions, dtype=np.uint64) // np.uint64(n), self.seed + 1)
        starts = at * block + (shift % np.uint64(block)).astype(np.int64)
        return np.stack([self.ids[s:s + block + 1] for s in starts]).astype(np.int64)


# ---------------------------------------------------------------- passages and hard negatives

class Passages:
    """Every distinct passage of some rows by number; texts stay in the files.

    `positives[q]` lists the passage numbers that answer row q, its own first and then those of rows
    with the same query; `given[q]` the negatives that its row carries.
    """

    def __init__(self, rows):
        self.rows, self.where, self.ids = rows, [], []
        self.positives, self.given = [], []
        number, same = {}, {}
        for q in range(len(rows)):
            row, found = rows[q], []
            for part in ("pos", "neg"):
                found.append([])
                for place, text in enumerate(row[part]):
                    key = text_id(text)
                    if key not in number:
                        number[key] = len(self.where)
                        self.where.append((q, part, place))
                        self.ids.append(key)
                    found[-1].append(number[key])
            self.positives.append(found[0])
            self.given.append(found[1])
            same.setdefault(text_id(row["query"]), []).append(q)
        for q, own in enumerate(list(self.positives)):
            others = [p for r in same[text_id(rows[q]["query"])] for p in self.positives[r]]
            self.positives[q] = list(dict.fromkeys(own + others))
            self.given[q] = [p for p in self.given[q] if p not in self.positives[q]]

    def __len__(self):
        return len(self.where)

    def text(self, number):
        """Return the text of a passage."""
        q, part, place = self.where[number]
        return self.rows[q][part][place]


def mine(queries, passages, positives, passage_ids, depth=50, cap=None, extra=None, chunk=256,
         progress=lambda x: x):
    """Return (Q, depth) int64 hard-negative candidates of each query, hardest first, -1 padded.

    queries (Q, D), passages (P, D): normalised float32 embeddings. A query's positives, and
    passages whose text id equals one of theirs, are left out. extra: (Q, X) further candidates
    (BM25's), ranked by the same cosine. cap: drop candidates above cap * the positive's score
    (a guard against false negatives that the paper does not have). Never holds Q x P scores.
    """
    pool = np.full((len(queries), depth), -1, dtype=np.int64)
    k = min(len(passages), depth + max((len(p) for p in positives), default=0) + 8)
    embedded = torch.from_numpy(passages)
    ids = np.asarray(passage_ids)
    for start in progress(range(0, len(queries), chunk)):
        scores = torch.from_numpy(queries[start:start + chunk]) @ embedded.T    # (chunk, P)
        top = scores.topk(k, dim=1).indices.numpy()
        scores = scores.numpy()
        for row, q in enumerate(range(start, min(start + chunk, len(queries)))):
            near = top[row]
            if extra is not None:
                near = np.unique(np.r_[near, extra[q][extra[q] >= 0]])
            own = list(positives[q])
            near = near[~np.isin(ids[near], ids[own])]
            if cap is not None and own:
                near = near[scores[row, near] <= cap * scores[row, own].max()]
            near = near[np.argsort(-scores[row, near], kind="stable")][:depth]
            pool[q, :len(near)] = near
    return pool


# ---------------------------------------------------------------- batches

@dataclass
class Batch:
    """One step's examples on this rank, as the model takes them.

    ids (S,) and lengths: the texts, in the order queries, positives, negatives (contrastive), or
    sentence1, sentence2 (STS), or the documents of the LM stages, then with targets (S,).
    """
    task: str
    ids: torch.Tensor
    lengths: list
    rows: np.ndarray                       # the examples' numbers in their source
    targets: torch.Tensor | None = None
    query_ids: torch.Tensor | None = None          # (B,) text ids
    positive_ids: torch.Tensor | None = None       # (B,)
    negative_ids: torch.Tensor | None = None       # (B, N), -1 where there is none
    scores: torch.Tensor | None = None             # (B,) STS
    truncated: int = 0                             # texts that were cut

    def to(self, device):
        """Move the tensors; lengths stay on the CPU, where the packing is planned."""
        for name in ("ids", "targets", "query_ids", "positive_ids", "negative_ids", "scores"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=True))
        return self

    def chunks(self, n_texts):
        """Yield (ids, lengths, targets or None) of about `n_texts` texts at a time; 0: all.

        Absent negatives are counted as texts: all ranks get the same number of chunks, whichever
        of their negatives are there. Under fsdp each chunk is a meeting of all ranks.
        """
        texts = sure = len(self.lengths)
        if self.negative_ids is not None:
            sure = 2 * len(self.negative_ids)              # queries and positives are always there
            texts = sure + self.negative_ids.numel()
        count, start = min(-(-texts // (n_texts or texts)), sure), 0
        cuts = [-(-i * len(self.lengths) // count) for i in range(count + 1)]
        for first, last in zip(cuts, cuts[1:]):
            lengths = self.lengths[first:last]
            end = start + sum(lengths)
            targets = None if self.targets is None else self.targets[start:end]
            yield self.ids[start:end], lengths, targets
            start = end

    @classmethod
    def of(cls, task, texts, limits, tokenizer, rows, **rest):
        """Tokenise `texts`, cut each at its limit (counted), and lay them out flat."""
        encoded = tokenizer.encode_batch(texts)
        cut = [ids[:limit] or [tokenizer.eos_id] for ids, limit in zip(encoded, limits)]
        truncated = sum(len(ids) > limit for ids, limit in zip(encoded, limits))
        flat = np.fromiter((i for ids in cut for i in ids), dtype=np.int64)
        return cls(task, torch.from_numpy(flat), [len(ids) for ids in cut], rows,
                   truncated=truncated, **rest)


def lm_batch(stream, positions, block):
    """Return a `Batch` of windows with the next token of each place as its target."""
    windows = torch.from_numpy(stream.windows(positions, block))            # (B, block + 1)
    return Batch("text", windows[:, :-1].reshape(-1), [block] * len(windows),
                 np.asarray(positions), targets=windows[:, 1:].reshape(-1))


def sft_batch(rows, indices, tokenizer, max_len, default_prompt):
    """Return a `Batch` of prompt + output + end-of-text; only the output is predicted."""
    ids, targets, lengths, truncated = [], [], [], 0
    examples = [rows[int(i)] for i in indices]
    prompts = tokenizer.encode_batch([
        format_sft(default_prompt if e["prompt"] is None else e["prompt"], e["query"])
        for e in examples])
    outputs = tokenizer.encode_batch([e["pos"][0] for e in examples])
    for prompt, output in zip(prompts, outputs):
        truncated += len(prompt) > max_len // 2 or len(prompt) + len(output) > max_len
        prompt = prompt[:max(max_len // 2, 1)]         # the output keeps at least half of the room
        whole = (prompt + output + [tokenizer.eos_id])[:max_len + 1]
        ids += whole[:-1]
        targets += [-100] * (len(prompt) - 1) + whole[len(prompt):]
        lengths.append(len(whole) - 1)
    return Batch("sft", torch.tensor(ids), lengths, np.asarray(indices),
                 targets=torch.tensor(targets), truncated=truncated)


def contrastive_batch(task, rows, indices, tokenizer, query_len, passage_len, default_prompt,
                      negatives=None, passages=None):
    """Return a `Batch` of queries, positives and (with `negatives`, (B, N) passage numbers) these.

    The positive of a query with several is drawn by the query's number and place, not by chance of
    the process. Places without a negative (-1) carry no text.
    """
    examples = [rows[int(i)] for i in indices]
    queries = [format_query(e["query"], default_prompt if e["prompt"] is None else e["prompt"])
               for e in examples]
    positives = [e["pos"][int(i) % len(e["pos"])] for i, e in zip(indices, examples)]
    texts, ids = queries + positives, None
    if negatives is not None:
        present = negatives[negatives >= 0].tolist()
        texts = texts + [passages.text(p) for p in present]
        known = torch.tensor([passages.ids[p] for p in present], dtype=torch.int64)
        ids = torch.full(negatives.shape, -1, dtype=torch.int64)
        ids[negatives >= 0] = known
    limits = [query_len] * len(queries) + [passage_len] * (len(texts) - len(queries))
    return Batch.of(task, texts, limits, tokenizer, np.asarray(indices), negative_ids=ids,
                    query_ids=torch.tensor([text_id(e["query"]) for e in examples]),
                    positive_ids=torch.tensor([text_id(p) for p in positives]))


def sts_batch(rows, indices, tokenizer, max_len, default_prompt):
    """Return a `Batch` of sentence pairs with their scores."""
    examples = [rows[int(i)] for i in indices]
    texts = [format_query(e[key], default_prompt) for key in ("sentence1", "sentence2")
             for e in examples]
    return Batch.of("sts", texts, [max_len] * len(texts), tokenizer, np.asarray(indices),
                    scores=torch.tensor([e["score"] for e in examples]))
