"""Fetch public data sets into this project's formats, one command each (PAPER Table 10, Table 11).

    python -m tools.prepare --list
    python -m tools.prepare msmarco --out=data
    python -m tools.prepare miracl --lang=fi --decontaminate="mteb:MTEB(eng, v2),data/eval"
    python -m tools.prepare wikipedia --lang=km --out=data --limit=100000

Writes DIR/NAME.jsonl for train.py, and DIR/NAME.jsonl.report.json with source, licence and counts.
--decontaminate leaves out what overlaps files, folders, mteb's tasks and benchmarks. Rows
are streamed, nothing but the output is stored, and it appears whole or not at all. Needs `pip
install datasets`. The sets stand in public_sets.tsv, and docs/data.md says which of the paper's are
missing. Licences are as their publishers state them: read them first, several are for research
only.
UNSPECIFIED: revisions, splits and prompts; the paper names the sets alone.
"""
import csv
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from configurator import load_config, run_command
from data import PARSERS
from engine.collection import document_text
from tools.filters import decontaminate, write_rows

KEYS = {                           # ours, by kind; a set's `columns` name its own in this order
    "retrieval": ("query", "pos", "neg"),
    "pairs": ("query", "pos"),
    "sts": ("sentence1", "sentence2", "score"),
    "labels": ("text", "label"),   # tools.sets draws the other labels
    "text": ("text", "title"),     # one document for pretraining; not every set has titles
}


@cache
def public_sets():
    """Return {name: entry}: where a set lies, and what a user must know of it.

    An entry has the columns of public_sets.tsv. columns: what `KEYS` are called there. scores:
    the least and the largest that STS can have. config: "{lang}" stands for --lang, by the set's
    own code of it. lang: the default of --lang, empty for one language only.
    """
    with open(Path(__file__).with_name("public_sets.tsv"), encoding="utf-8") as file:
        return {row["name"]: SimpleNamespace(**row) for row in csv.DictReader(file, delimiter="\t")}


def from_columns(entry, row):
    """Return a row of ours: the columns that the entry names, by our keys."""
    ours = {key: row[name] for key, name in zip(KEYS[entry.kind], entry.columns.split())}
    if entry.kind == "text" and ours["text"]:
        ours = {"text": document_text(ours)}
    if entry.scores:                                   # one scale for all sets: 0 to 1
        least, most = map(float, entry.scores.split())
        ours["score"] = (ours["score"] - least) / (most - least)
    return ours | ({"prompt": entry.prompt} if entry.prompt else {})


def from_mkqa(row):
    """Yield the question in each of its languages: rows of a collection's queries.jsonl.

    PAPER Table 13 has 25 languages beside English, three of them Chinese. As in the protocol of
    retrieval on MKQA, aliases count, and a question of yes or no has no answer to look for.
    """
    answers = [text for answer in row["answers"]["en"]
               for text in (answer["text"], *(answer.get("aliases") or ())) if text]
    if {answer.lower() for answer in answers} <= {"yes", "no"}:
        answers = []
    for lang, text in row["queries"].items():
        lang = {"zh_cn": "zh"}.get(lang, lang)
        yield {"id": f"{row['example_id']}/{lang}", "lang": lang, "text": text, "answers": answers}


def convert(entry, row, number):
    """Return the rows of ours that a row of the set gives; ValueError for an unknown schema."""
    try:
        rows = list(from_mkqa(row)) if entry.kind == "queries" else [from_columns(entry, row)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{entry.hub}: row {number} is not as expected ({error!r}); its columns "
                         f"are {', '.join(sorted(row))}") from error
    parse, good = PARSERS.get(entry.kind, PARSERS["text"]), []
    for one in rows:
        with suppress(ValueError):                     # an empty text
            parse(one)
            good.append(one)
    return good


# ---------------------------------------------------------------- a run

@dataclass(frozen=True)
class PrepareConfig:
    """The settings of `python -m tools.prepare NAME`."""
    name: str                                  # one of --list
    out: str = "data"                          # folder to write to
    lang: str | None = None                    # language code, for the sets that have several
    limit: int | None = None                   # rows to write at most
    decontaminate: tuple[str, ...] = ()        # files or folders of evaluation texts, mteb:NAME

    def __post_init__(self):
        sets = public_sets()
        if self.name not in sets:
            raise ValueError(f"no set {self.name!r}; there are {', '.join(sets)}")
        if self.lang and not sets[self.name].lang:
            raise ValueError(f"{self.name} has one language; leave out --lang={self.lang}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} must be at least 1")


def stream(entry, lang):
    """Yield the rows of a set from the hub, without a download first.

    Raises ValueError without `datasets`, ConnectionError where the set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("public sets are read with the package datasets: `pip install "
                         "datasets`") from None
    try:
        yield from load_dataset(entry.hub, entry.config.format(lang=lang) or None,
                                split=entry.split, revision=entry.revision or None, streaming=True)
    except Exception as error:                     # the library's own errors have no common class
        reason = " ".join(str(error).split())[:300]              # the hub's own have empty lines
        raise ConnectionError(
            f"https://huggingface.co/datasets/{entry.hub} cannot be read: {type(error).__name__}: "
            f"{reason}. Is the hub reachable (HF_ENDPOINT names a mirror, HF_TOKEN an account)?"
        ) from error


def read_set(cfg, entry, lang, counts):
    """Yield the rows of ours; count rows of the set as "read", and what gave none as "unusable"."""
    with tqdm(stream(entry, lang), desc=cfg.name, unit="row", disable=None) as bar:
        for row in bar:
            rows = convert(entry, row, counts["read"])
            counts.update(read=1, unusable=not rows)
            yield from rows


def prepare(cfg):
    """Write one set; return the path of its JSONL file."""
    entry = public_sets()[cfg.name]
    lang, counts = cfg.lang or entry.lang, Counter()
    path = Path(cfg.out) / f"{cfg.name}{f'-{lang}' if lang else ''}.jsonl"
    if path.is_file():
        print(f"{path} exists already; delete it to fetch it again")
        return path
    filters = [partial(decontaminate, paths=cfg.decontaminate)] if cfg.decontaminate else []
    filters.append(lambda rows, counts: islice(rows, cfg.limit))
    write_rows(path, read_set(cfg, entry, lang, counts), filters, counts,
               {"config": asdict(cfg), "set": vars(entry)})
    print(f"{entry.kind}; licence: {entry.licence}")
    return path


def show_sets():
    """Print the table of sets."""
    for name, entry in public_sets().items():
        lang = f" (--lang={entry.lang})" if entry.lang else ""
        print(f"{name:<16} {entry.kind:<15} {entry.hub}{lang}\n{'':<16} {entry.size}; "
              f"licence: {entry.licence}")


def main(argv=None):
    """Fetch one set, or list them; see the module docstring."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--list" in argv:
        return show_sets()
    if len(names := [arg for arg in argv if not arg.startswith("-")]) > 1:
        raise ValueError(f"one set at a time, not {' '.join(names)}")
    prepare(load_config(PrepareConfig, [arg if arg.startswith("-") else f"--name={arg}"
                                        for arg in argv]))


if __name__ == "__main__":
    run_command(main)
