"""Filters over rows: length, duplicates, script, score, overlap with evaluation texts.

    python -m tools.filters --input=pairs.jsonl --out=clean.jsonl --min_chars=20 --dedup=near
    python -m tools.filters --input=pairs.jsonl --out=clean.jsonl --min_score=0.4 --scorer=out/embed_sup
    python -m tools.filters --input=text.jsonl.gz --out=clean.jsonl --script=zh --decontaminate=eval/
    python -m tools.filters --input=pairs.jsonl --out=clean.jsonl --decontaminate="mteb:MTEB(eng, v2)"

PAPER Sec. 3.1.2: pairs that gte-Qwen2-7B scores below 0.4 are dropped; a scorer here is a folder of
train.py, an exported directory, or any sentence-transformers model. Each filter is a generator
(rows, drop) -> rows that calls drop(row, reason) for what it leaves out, so filters chain, and
memory stays bounded but for the duplicates: 16 bytes a row exact, about 3 kB a row near.
For terabytes of web text use Data-Juicer first: it writes {"text"} lines, which go on from here.
UNSPECIFIED: everything but the 0.4; which filters ran and what they dropped is OUT.report.json.
"""
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from clr import script_share, to_line
from configurator import load_config
from data import format_query, read_jsonl

TEXT_KEYS = ("text", "query", "input", "pos", "output", "sentence1", "sentence2")
NGRAM = 13                         # words in a row that count as overlap with an evaluation text
BANDS, BAND_ROWS, SHINGLE = 16, 8, 5
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f\u1780-\u17ff]|\w+")


def texts_of(row):
    """Return the texts of a row of any of data.py's formats; negatives are none of them.

    >>> texts_of({"query": "q", "pos": ["a", "b"], "neg": ["c"], "id": "7"})
    ['q', 'a', 'b']
    """
    texts = []
    for key in TEXT_KEYS:
        value = row.get(key)
        texts += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text in a row with the keys {sorted(row)[:8]}; one of "
                         f"{', '.join(TEXT_KEYS)} is needed, a string or a list of strings")
    return texts


def words_of(text):
    """Return the words of a text, without case, width and punctuation.

    Scripts without spaces give one word a character, so that 13 words mean something there too.

    >>> words_of("Ｈello, World! 你好")
    ['hello', 'world', '你', '好']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def digest(words):
    """Return a 16-byte hash of a list of words."""
    return hashlib.blake2b("\0".join(words).encode("utf-8", "replace"), digest_size=16).digest()


# ---------------------------------------------------------------- filters

def by_length(rows, drop, low=0, high=0):
    """Keep the rows each of whose texts has `low` to `high` characters; high 0: no limit."""
    for row in rows:
        lengths = [len(text) for text in texts_of(row)]
        if min(lengths) < low:
            drop(row, "too short")
        elif high and max(lengths) > high:
            drop(row, "too long")
        else:
            yield row


def by_script(rows, drop, lang, least=0.5):
    """Keep the rows with at least this share of letters in the script of a language code."""
    for row in rows:
        if script_share("\n".join(texts_of(row)), lang) < least:
            drop(row, "script")
        else:
            yield row


def exact_duplicates(rows, drop):
    """Keep the first of the rows that say the same, whatever their case and punctuation."""
    seen = set()
    for row in rows:
        key = digest([word for text in texts_of(row)
                      for word in [*(words_of(text) or [text]), "\n"]])
        if key in seen:
            drop(row, "exact duplicate")
        else:
            seen.add(key)
            yield row


def minhash(text, seed=0):
    """Return the (128,) uint32 MinHash signature of a text's 5-character shingles.

    Two signatures agree in a place with the probability of the Jaccard overlap of the shingles.
    """
    letters = " ".join(words_of(text)).ljust(SHINGLE).encode("utf-32-le", "replace")
    codes = np.frombuffer(letters, np.uint32).astype(np.uint64)                      # (C,)
    n = len(codes) - SHINGLE + 1
    shingles = np.zeros(n, np.uint64)
    for i in range(SHINGLE):                                    # wraps modulo 2^64
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + codes[i:i + n]
    shingles = np.unique(shingles ^ (shingles >> np.uint64(29)))                     # (S,)
    draw = np.random.default_rng(seed).integers(0, 2 ** 64, (2, BANDS * BAND_ROWS, 1), np.uint64)
    signature = np.full(BANDS * BAND_ROWS, 2 ** 32 - 1, np.uint32)
    for start in range(0, len(shingles), 4096):
        hashed = draw[0] * shingles[start:start + 4096] | np.uint64(1)               # (128, s)
        hashed = ((hashed ^ (hashed >> np.uint64(31))) * (draw[1] | np.uint64(1))) >> np.uint64(32)
        signature = np.minimum(signature, hashed.min(1).astype(np.uint32))
    return signature


def near_duplicates(rows, drop, least=0.8):
    """Keep the first of the rows whose 5-character shingles overlap by at least `least` (Jaccard).

    128 MinHashes in 16 bands of 8: rows that share a band are compared by their whole signatures,
    so a pair with overlap s is compared with probability 1 - (1 - s^8)^16: 0.95 at s = 0.8, more
    above. The estimate of s has a standard error of 0.035 there.
    """
    signatures, bands = [], {}
    for row in rows:
        signature = minhash("\n".join(texts_of(row)))
        keys = [bytes([b]) + part.tobytes()
                for b, part in enumerate(signature.reshape(BANDS, BAND_ROWS))]
        others = {bands[key] for key in keys if key in bands}
        if any((signatures[i] == signature).mean() >= least for i in others):
            drop(row, "near duplicate")
            continue
        for key in keys:
            bands.setdefault(key, len(signatures))
        signatures.append(signature)
        yield row


def by_score(rows, drop, encoder, least=0.4, batch=256):
    """Keep the pairs whose query and passage have at least this cosine (PAPER Sec. 3.1.2).

    encoder: anything with `encode(list of str) -> (N, D)`; None if every row has its own "score".
    A row with "score" is judged by that. Of several positives those above stay, and the row goes
    when none does.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        asked, flat = [], []
        for row in chunk:
            if "score" in row:
                continue
            query, key = ("input", "output") if "input" in row else ("query", "pos")
            if encoder is None or query not in row or key not in row:
                raise ValueError(f"a score needs {query!r} and {key!r} and a scorer, or 'score' in "
                                 f"the row; there are {sorted(row)[:8]}")
            positives = [row[key]] if isinstance(row[key], str) else row[key]
            asked.append((row, key, positives))
            flat += [format_query(row[query], row.get("prompt") or row.get("instruction"))]
            flat += positives
        vectors = iter(_unit(encoder.encode(flat)) if flat else ())
        scores = {}
        for row, key, positives in asked:
            query = next(vectors)
            scores[id(row)] = key, positives, [float(query @ next(vectors)) for _ in positives]
        for row in chunk:
            key, positives, cosines = scores.get(id(row), (None, None, [row.get("score")]))
            kept = [i for i, cosine in enumerate(cosines) if cosine >= least]
            if not kept:
                drop(row, "score")
            elif len(kept) < len(cosines):
                yield {**row, key: [positives[i] for i in kept]}
            else:
                yield row


def _unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Decontaminator:
    """The evaluation texts as hashes; `reason(row)` tells whether a training row overlaps them.

    paths: JSONL(.gz) files, or folders of them, of which corpus.jsonl is passed over: a
    collection's documents are common background (Wikipedia), its queries are not. Name the file
    to compare with it. "mteb:NAME" stands for a task or a benchmark of mteb. Any string in a row
    counts as a text, but ids and labels do not. A text is found if it is equal, or if 13 words in
    a row are; a text below 13 words has only the first.
    """

    def __init__(self, paths):
        self.whole, self.grams = set(), set()
        for path in paths:
            named = str(path).startswith("mteb:")
            for row in mteb_rows(path.removeprefix("mteb:")) if named else _rows([path]):
                for text in _strings(row):
                    words = words_of(text)
                    if len(words) >= 3:                  # "yes", a label: equal by chance
                        self.whole.add(digest(words))
                    self.grams.update(_grams(words))
        if not self.whole:
            raise ValueError(f"{', '.join(map(str, paths))}: no evaluation text in there")

    def reason(self, row):
        """Return "equal to an evaluation text", "13 words ..." or None."""
        words = [words_of(text) for text in texts_of(row)]
        if any(len(w) >= 3 and digest(w) in self.whole for w in words):
            return "equal to an evaluation text"
        if any(not self.grams.isdisjoint(_grams(w)) for w in words):
            return f"{NGRAM} words of an evaluation text"
        return None

    def __call__(self, rows, drop):
        """Keep the rows that do not overlap."""
        for row in rows:
            reason = self.reason(row)
            if reason:
                drop(row, reason)
            else:
                yield row


def mteb_rows(name):
    """Yield the rows that a task or a benchmark of mteb evaluates on; their data is downloaded.

    Of retrieval the queries only, as of a collection. Raises ValueError for an unknown name,
    ImportError without mteb.
    """
    from eval import mteb_tasks                           # only here: the rest needs no model
    for task in tqdm(mteb_tasks(name)[0], desc=name, unit="task", disable=None):
        task.load_data()
        yield from _held_out(task.dataset, set(task.metadata.eval_splits))
        task.unload_data()


def _held_out(data, splits):
    """Yield the rows of {subset: {split: rows}}, in which rows may be {"queries": rows, ...}."""
    if not hasattr(data, "keys"):
        yield from data
        return
    for key in data.keys():
        background = key in ("corpus", "relevant_docs", "top_ranked")
        if not background and (key in splits or key not in ("train", "validation", "dev", "test")):
            yield from _held_out(data[key], splits)


def joined(names):
    """Undo the command line's split of "mteb:MTEB(eng, v2)" at its comma."""
    from eval import join_names                           # only here: the rest needs no model
    return join_names(names) if any("(" in name for name in names) else list(names)


def _rows(paths):
    for path in _files(paths):
        yield from read_jsonl(path)


def _grams(words):
    return {hash(tuple(words[i:i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


def _files(paths):
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*.jsonl*") if p.suffix in (".jsonl", ".gz")
                           and not p.name.startswith("corpus."))
            if not found:
                raise FileNotFoundError(f"{path}: no JSONL file in there")
            yield from found
        else:
            yield path


def _strings(row):
    for key, value in row.items():
        if key not in ("id", "_id", "lang", "split", "label", "prompt", "instruction"):
            yield from [value] if isinstance(value, str) else \
                (v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class FilterConfig:
    """The settings of `python -m tools.filters`; filters run in this order."""
    input: tuple[str, ...]                     # JSONL(.gz) files in any of data.py's formats
    out: str                                   # JSONL file to write; beside it OUT.report.json
    dropped: str | None = None                 # JSONL file for what is left out, with "reason"
    min_chars: int = 0                         # of every text of a row
    max_chars: int = 0                         # of every text of a row; 0: no limit
    script: str | None = None                  # language code whose script the letters must be in
    min_script: float = 0.5                    # least share of such letters
    dedup: Literal["none", "exact", "near"] = "none"
    near: float = 0.8                          # least Jaccard overlap of a near duplicate
    decontaminate: tuple[str, ...] = ()        # files or folders of evaluation texts, mteb:NAME
    min_score: float | None = None             # least cosine of query and passage; the paper's 0.4
    scorer: str | None = None                  # checkpoint, exported or sentence-transformers model

    def __post_init__(self):
        if self.max_chars and self.max_chars < self.min_chars or self.min_chars < 0:
            raise ValueError(f"min_chars {self.min_chars}, max_chars {self.max_chars}")
        if not (0 < self.near <= 1 and 0 <= self.min_script <= 1):
            raise ValueError(f"near {self.near} and min_script {self.min_script} must be shares")


def load_scorer(path):
    """Return an Embedder for our folders, else the sentence-transformers model of that name."""
    from embed import EXPORTED, Embedder                  # only here: the rest needs no model
    if Path(path).is_dir() and ((Path(path) / EXPORTED).is_file()
                                or not (Path(path) / "modules.json").is_file()):
        return Embedder(path)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"{path}: no folder of train.py or export.py; for other models `pip "
                         "install sentence-transformers`") from None
    return SentenceTransformer(path)


def make_filters(cfg):
    """Return the filters that the settings ask for, the cheap ones first."""
    filters = []
    if cfg.min_chars or cfg.max_chars:
        filters.append(partial(by_length, low=cfg.min_chars, high=cfg.max_chars))
    if cfg.script:
        filters.append(partial(by_script, lang=cfg.script, least=cfg.min_script))
    if cfg.dedup != "none":
        filters.append(exact_duplicates)
    if cfg.dedup == "near":
        filters.append(partial(near_duplicates, least=cfg.near))
    if cfg.decontaminate:
        filters.append(Decontaminator(joined(cfg.decontaminate)))
    if cfg.min_score is not None:
        scorer = load_scorer(cfg.scorer) if cfg.scorer else None
        filters.append(partial(by_score, encoder=scorer, least=cfg.min_score))
    return filters


def chain(rows, filters, drop):
    """Put one filter behind the other; drop(row, reason) hears of every row left out."""
    for one in filters:
        rows = one(rows, drop)
    return rows


def write_aside(path, write):
    """Let `write(file)` fill a file aside, then put it in its place, whole or not at all."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(argv=None):
    """Filter some files; see the module docstring."""
    cfg, counts = load_config(FilterConfig, argv), Counter()
    filters = make_filters(cfg)

    def read():
        for path in cfg.input:
            for row in tqdm(read_jsonl(path), desc=Path(path).name, unit="row", disable=None):
                counts["read"] += 1
                yield row

    def write(file, aside=None):
        def drop(row, reason):
            counts[reason] += 1
            if aside:
                aside.write(to_line({**row, "reason": reason}))
        with closing(read()) as rows:
            for row in chain(rows, filters, drop):
                counts["kept"] += 1
                file.write(to_line(row))

    if cfg.dropped:
        write_aside(cfg.dropped, lambda aside: write_aside(cfg.out, lambda f: write(f, aside)))
    else:
        write_aside(cfg.out, write)
    reasons = {k: n for k, n in counts.most_common() if k not in ("read", "kept")}
    report = {"read": counts["read"], "kept": counts["kept"], "dropped": reasons,
              "config": asdict(cfg)}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_aside(f"{cfg.out}.report.json", lambda file: file.write(text.encode()))
    print(f"{cfg.out}: {counts['kept']:,} of {counts['read']:,} rows")
    print("dropped: " + (", ".join(f"{k} {n:,}" for k, n in reasons.items()) or "none"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"filters: error: {error}")
