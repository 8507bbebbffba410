"""Filters over rows: exact duplicates, overlap with evaluation texts, the scorer's 0.4.

    python -m tools.filters --input=pairs.jsonl --out=clean.jsonl --dedup \\
        --decontaminate="mteb:MTEB(eng, v2)"
    python -m tools.filters --input=pairs.jsonl --out=clean.jsonl --min_score=0.4 \\
        --scorer=Alibaba-NLP/gte-Qwen2-7B-instruct --trust_remote_code=true

PAPER Sec. 3.1.2: pairs that gte-Qwen2-7B-instruct scores below 0.4 are dropped before stage 3. A
scorer is any sentence-transformers model, also one of tools.export, with its own query prompt. Each
filter is a generator (rows, counts) -> rows that counts why it leaves rows out. Memory: some 110
bytes a row for duplicates. Length, script and near duplicates are Data-Juicer's job (docs/data.md).
UNSPECIFIED: everything but the 0.4. OUT.report.json says what ran and what it dropped.
"""
import hashlib
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

from configurator import load_config, run_command
from data import parse_pair
from engine.jsonl import check_name, read_jsonl, write_jsonl, write_object
from engine.encoders import SentenceTransformerBaseline, join_names, mteb_tasks

TEXT_KEYS = ("title", "text", "query", "input", "pos", "output", "sentence1", "sentence2")
NOT_TEXT = {"id", "_id", "lang", "split", "label"}
NGRAM = 13                         # words in a row that count as overlap with an evaluation text
_WORD = regex.compile(             # a character, of scripts without spaces, or a word; with marks
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]\p{M}*"
    r"|[\p{L}\p{M}\p{N}_]+")
_SYMBOL = regex.compile(rf"{_WORD.pattern}|[\p{{S}}#%&@*/\\]|-(?=\d)")    # and symbols


def texts_of(row):
    """Return the texts of a row of any of data.py's formats, negatives excepted.

    >>> texts_of({"query": "q", "pos": ["a", "b"], "neg": ["c"], "id": "7"})
    ['q', 'a', 'b']
    """
    texts = []
    for key in TEXT_KEYS:
        value = row.get(key)
        texts += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if isinstance(row.get("instruction"), str) and row.get("input") in ("", None):
        texts.insert(0, row["instruction"])            # it is the query then (data.parse_pair)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text in a row with the keys {sorted(row)[:8]}; one of "
                         f"{', '.join(TEXT_KEYS)} is needed, a string or a list of strings")
    return texts


def words_of(text, kind=_WORD):
    """Return the words of a text, without case, width and punctuation.

    Scripts without spaces give one word a character, so that 13 words mean something there too.

    >>> words_of("Ｈello, World! 你好 लड़की")
    ['hello', 'world', '你', '好', 'लड़की']
    """
    return kind.findall(unicodedata.normalize("NFKC", text).casefold())


# ---------------------------------------------------------------- filters

def exact_duplicates(rows, counts):
    """Keep the first of the rows that say the same, whatever their case and punctuation.

    Symbols count, as C++ is not C#, and so do a score, a label and an instruction.
    """
    seen = set()
    for row in rows:
        said = "\n".join([*(" ".join(words_of(text, _SYMBOL)) or text for text in texts_of(row)),
                          *(str(row.get(key)) for key in ("score", "label", "prompt",
                                                          "instruction"))])
        key = hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=16).digest()
        if key in seen:
            counts["exact duplicate"] += 1
        else:
            seen.add(key)
            yield row


def by_score(rows, counts, scorer, least=0.4, batch=256):
    """Keep the pairs whose query and passage have at least this cosine (PAPER Sec. 3.1.2).

    scorer: encode(texts, (side, None)) -> unit vectors (N, D). Of several positives those above
    stay; the row goes when none does.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        pairs = [parse_pair(row) for row in chunk]
        queries = scorer.encode([pair["query"] for pair in pairs], ("query", None))
        passages = scorer.encode([text for pair in pairs for text in pair["pos"]],
                                 ("document", None))
        ends = np.cumsum([len(pair["pos"]) for pair in pairs])
        for row, query, own in zip(chunk, queries, np.split(passages, ends)):
            good = np.flatnonzero(own @ query >= least)
            if not len(good):
                counts["score"] += 1
            elif isinstance(row.get("pos"), list):
                yield row | {key: [row[key][i] for i in good]
                             for key in ("pos", "pos_cosines") if row.get(key)}
            else:
                yield row


# ---------------------------------------------------------------- evaluation texts

def decontaminate(rows, counts, paths):
    """Keep the rows that do not overlap the evaluation texts, which are held as hashes.

    paths: JSONL(.gz) files, or folders of .jsonl and .ndjson (.gz) files, of which corpus.jsonl is
    passed over: a collection's documents are common background (Wikipedia), its queries are not.
    Name the file to compare with it. "mteb:NAME" stands for a task or a benchmark of mteb. Any
    string in a row counts as a text, but ids and labels do not. A text overlaps if it is equal, or
    if 13 words in a row are; a text below 13 words has only the first, one below 3 never overlaps.
    """
    known = set()
    for path in join_names(map(str, paths)):           # "mteb:MTEB(eng, v2)" holds a comma
        name = path.removeprefix("mteb:")
        texts = _strings(_rows(Path(path)) if name == path else mteb_rows(name))
        runs = {run for text in texts for run in _runs(words_of(text))}
        if not runs:
            raise ValueError(f"{path}: no evaluation text in there")
        known |= runs
    for row in rows:
        if any(not known.isdisjoint(_runs(words_of(text))) for text in texts_of(row)):
            counts["overlaps an evaluation text"] += 1
        else:
            yield row


def mteb_rows(name):
    """Yield the rows that a task or a benchmark of mteb evaluates on; their data is downloaded.

    Of retrieval the queries only, as of a collection. Raises ValueError for an unknown name,
    ImportError without mteb.
    """
    parts = [part for task in mteb_tasks(name)[0] for part in getattr(task, "tasks", [task])]
    for task in tqdm(parts, desc=name, unit="task", disable=None):
        task.load_data()
        if task.dataset is None:                   # of mteb 1's form
            task.convert_v1_dataset_format_to_v2(num_proc=None)
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


def _rows(path):
    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
    files = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes)
                   and not p.name.startswith("corpus."))
    for file in files if path.is_dir() else [path]:
        yield from read_jsonl(file)


def _runs(words):
    """Return hashes of all runs of `NGRAM` words; a shorter text is one run."""
    if len(words) < 3:                                 # "yes", a label: equal by chance
        return set()
    return {hash(tuple(words[i:i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}


def _strings(rows):
    for row in rows:
        for key, value in row.items():
            values = value if isinstance(value, list) else [value]
            yield from (x for x in values if isinstance(x, str) and key not in NOT_TEXT)


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class FilterConfig:
    """The settings of `python -m tools.filters`; filters run in this order."""
    input: tuple[str, ...]                     # JSONL(.gz) files in any of data.py's formats
    out: str                                   # JSONL file to write; beside it OUT.report.json
    dedup: bool = False                        # drop rows that say the same as one before
    decontaminate: tuple[str, ...] = ()        # files or folders of evaluation texts, mteb:NAME
    min_score: float | None = None             # least cosine of query and passage; the paper's 0.4
    scorer: str = "Alibaba-NLP/gte-Qwen2-7B-instruct"    # a name or a folder; default: the paper's
    trust_remote_code: bool | None = None      # whether the scorer's own code may run

    def __post_init__(self):
        check_name(self.out, self.input)
        if not self.dedup and not self.decontaminate and self.min_score is None:
            raise ValueError("no filter: give --dedup, --decontaminate or --min_score")
        if self.trust_remote_code is not None and self.min_score is None:
            raise ValueError("--trust_remote_code is for the scorer of --min_score")


def read_input(paths, check, counts):
    """Yield the rows of some files and count them; a row that `check` refuses is named by line."""
    for path in paths:
        rows = read_jsonl(path, check=check)
        for row in tqdm(rows, desc=Path(path).name, unit="row", disable=None):
            counts["read"] += 1
            yield row


def write_rows(out, rows, filters, counts, about):
    """Write the rows that pass all filters, then OUT.report.json; print its counts.

    counts: a Counter, of "read", "kept" and each reason. about: what else the report says.
    """
    for one in filters:
        rows = one(rows, counts)
    counts["kept"] = write_jsonl(out, rows)
    dropped = {key: n for key, n in counts.items() if n and key not in ("read", "kept")}
    report = {"read": counts["read"], "kept": counts["kept"], "dropped": dropped}
    write_object(f"{out}.report.json", report | about)
    print(f"{out}: {counts['kept']:,} of {counts['read']:,} rows\ndropped: "
          + (", ".join(f"{reason} {n:,}" for reason, n in dropped.items()) or "none"))


def main(argv=None):
    """Filter some files; see the module docstring."""
    cfg, counts, filters = load_config(FilterConfig, argv), Counter(), []
    check = texts_of if cfg.min_score is None else parse_pair
    if cfg.dedup:
        filters.append(exact_duplicates)
    if cfg.decontaminate:
        filters.append(partial(decontaminate, paths=cfg.decontaminate))
    if cfg.min_score is not None:                      # last: it costs most
        scorer = SentenceTransformerBaseline(cfg.scorer, cfg.trust_remote_code)
        filters.append(partial(by_score, scorer=scorer, least=cfg.min_score))
    write_rows(cfg.out, read_input(cfg.input, check, counts), filters, counts,
               {"config": asdict(cfg)})


if __name__ == "__main__":
    run_command(main)
