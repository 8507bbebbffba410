"""Fetch public data sets into this project's formats, one command each (PAPER Table 10, Table 11).

    python -m tools.prepare --list
    python -m tools.prepare msmarco --out=data
    python -m tools.prepare miracl --lang=fi --decontaminate="mteb:MTEB(eng, v2),data/eval"
    python -m tools.prepare wikipedia --lang=km --out=data --limit=100000

Writes DIR/NAME.jsonl for train.py, DIR/NAME.json with source, licence and counts, and what
overlapped the evaluation texts (files, folders, mteb's tasks and benchmarks) as
DIR/NAME.removed.jsonl. Rows are streamed, nothing but the output is stored, and it appears whole or
not at all. Needs `pip install datasets`. The sets stand in public_sets.tsv, and docs/data.md says
which of the paper's are missing. Licences are as their publishers state them: read them first,
several are for research only.
UNSPECIFIED: revisions, splits and prompts; the paper names the sets alone.
"""
import csv
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from configurator import load_config
from data import PARSERS, document_text
from tools.filters import decontaminate, write_report, write_rows

LANGUAGE_NAMES = {                 # of a repository, where a language goes by another name there
    "castorini/mr-tydi": {"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish",
                          "id": "indonesian", "ja": "japanese", "ko": "korean", "ru": "russian",
                          "sw": "swahili", "te": "telugu", "th": "thai"},
    "allenai/c4": {"he": "iw"}}                                # the code before 1989


@cache
def public_sets():
    """Return {name: entry}: where a set lies, and what a user must know of it.

    An entry has the columns of public_sets.tsv. columns: what query, passage and negatives are
    called there, or one of `CONVERTERS`. config, files: "{lang}" stands for --lang. files: read
    these where the hub's own loader is a script, which `datasets` no longer runs. lang: the default
    of --lang, empty for one language only.
    """
    with open(Path(__file__).with_name("public_sets.tsv"), encoding="utf-8") as file:
        return {row["name"]: SimpleNamespace(**row) for row in csv.DictReader(file, delimiter="\t")}


def in_language(entry, text, lang):
    """Put a language, by the name that the set has for it, into its `config` or `files`."""
    return text.format(lang=LANGUAGE_NAMES.get(entry.hub, {}).get(lang, lang)) or None


# ---------------------------------------------------------------- converters: row -> our rows

def _columns(value):
    """Return {key: list}; a list of structs arrives as that or as a list of dicts."""
    if isinstance(value, dict):
        return value
    return {key: [item[key] for item in value] for key in (value[0] if value else ())}


def _texts(value):
    """Return the texts of one string, of a list of them, or of nothing."""
    return [text for text in ([value] if isinstance(value, str) else value or [])
            if text and text.strip()]


def _retrieval(query, pos, neg=()):
    pos = _texts(pos)
    neg = [text for text in _texts(neg) if text not in pos]
    return [{"query": query, "pos": pos} | ({"neg": neg} if neg else {})] if pos and query else []


def from_columns(names, row):
    """Return {query, pos, neg?} of a row with these columns; "negative" is "negative_1", too."""
    query, pos, *neg = names.split()
    keys = [key for key in row if neg and re.fullmatch(rf"{neg[0]}(_\d+)?", key)]
    if neg and not keys:
        raise KeyError(neg[0])
    return _retrieval(row[query], row[pos], [text for key in keys for text in _texts(row[key])])


def from_msmarco(row):
    """Return the passages an annotator selected as positives, the others shown as negatives."""
    shown = _columns(row["passages"])
    marked = list(zip(shown.get("is_selected", ()), shown.get("passage_text", ())))
    return _retrieval(row["query"], [t for s, t in marked if s], [t for s, t in marked if not s])


def from_hotpotqa(row):
    """Return the paragraphs with supporting facts as positives, the distractors as negatives."""
    context, facts = _columns(row["context"]), set(_columns(row["supporting_facts"])["title"])
    named = [(title, document_text({"title": title, "text": "".join(sentences)}))
             for title, sentences in zip(context["title"], context["sentences"])]
    return _retrieval(row["question"], [t for title, t in named if title in facts],
                      [t for title, t in named if title not in facts])


def from_squad(row):
    """Return the question and the paragraph it was asked about."""
    return _retrieval(row["question"], document_text({"title": row["title"].replace("_", " "),
                                                      "text": row["context"]}))


def from_passages(row):
    """Return a row of {query, positive_passages, negative_passages}, with titles if any."""
    def texts(key):
        shown = _columns(row[key])
        titles = shown.get("title") or [""] * len(shown.get("text", ()))
        return [document_text({"title": title, "text": text})
                for title, text in zip(titles, shown.get("text", ()))]
    return _retrieval(row["query"], texts("positive_passages"), texts("negative_passages"))


def from_sts(row):
    """Return {sentence1, sentence2, score}; CoSENT reads only the order of scores."""
    return [{key: row[key] for key in ("sentence1", "sentence2")} | {"score": float(row["score"])}]


def from_reviews(row):
    """Return a review with its stars as the label's text, the other stars as negatives."""
    stars = [f"{n} star{'s' if n > 1 else ''}" for n in range(1, 6)]
    label = stars[row["label"]]
    return _retrieval(row["text"], label, [s for s in stars if s != label])


def from_labels(row):
    """Return {text, label} of a classification set; tools.sets draws the other labels."""
    label = str(row["label_text"]).strip()
    return [{"text": row["text"], "label": label}] if row["text"].strip() and label else []


def from_mkqa(row):
    """Return the question in each of its languages: rows of a collection's queries.jsonl.

    PAPER Table 13 has 25 languages beside English, three of them Chinese.
    """
    names = {"zh_cn": "zh"}
    return [{"id": f"{row['example_id']}/{names.get(lang, lang)}", "lang": names.get(lang, lang),
             "text": text, "answers": [a["text"] for a in row["answers"]["en"] if a["text"]]}
            for lang, text in row["queries"].items() if text]


def from_article(row):
    """Return text, and title if any, of an article or a page as one document for pretraining."""
    return [{"text": document_text(row)}] if row["text"] else []


CONVERTERS = {"msmarco": from_msmarco, "hotpotqa": from_hotpotqa, "squad": from_squad,
              "passages": from_passages, "sts": from_sts, "labels": from_labels,
              "queries": from_mkqa, "classification": from_reviews, "text": from_article}


def convert(entry, row, number):
    """Return (rows of ours, how many of them are unusable); ValueError for an unknown schema."""
    try:
        converter = CONVERTERS.get(entry.columns or entry.kind)
        rows = converter(row) if converter else from_columns(entry.columns, row)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{entry.hub}: row {number} is not as expected ({error!r}); its columns "
                         f"are {', '.join(sorted(row))}") from error
    good = []
    for one in rows:
        try:
            if entry.kind in PARSERS:
                PARSERS[entry.kind](one)
            good.append(one | ({"prompt": entry.prompt} if entry.prompt else {}))
        except ValueError:
            pass
    return good, len(rows) - len(good) if rows else 1


# ---------------------------------------------------------------- a run

@dataclass(frozen=True)
class PrepareConfig:
    """The settings of `python -m tools.prepare NAME`."""
    name: str                                  # one of --list
    out: str = "data"                          # folder to write to
    lang: str | None = None                    # language code, for the sets that have several
    limit: int | None = None                   # rows to write at most
    decontaminate: tuple[str, ...] = ()        # files or folders of evaluation texts, mteb:NAME
    local: tuple[str, ...] = ()                # copies of the set's files, instead of the hub

    def __post_init__(self):
        sets = public_sets()
        if self.name not in sets:
            raise ValueError(f"no set {self.name!r}; there are {', '.join(sets)}")
        if self.lang and not sets[self.name].lang:
            raise ValueError(f"{self.name} has one language; leave out --lang={self.lang}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} must be at least 1")


def stream(entry, lang, local=()):
    """Yield the rows of a set, from the hub or from copies of its files, without a download first.

    Raises ValueError without `datasets`, ConnectionError where the set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("public sets are read with the package datasets: `pip install "
                         "datasets`") from None
    files = list(local) or [in_language(entry, entry.files, lang)]
    try:
        if files[0]:
            form = "parquet" if files[0].endswith(".parquet") else "json"
            yield from load_dataset(form, data_files=files, split="train", streaming=True)
        else:
            config = in_language(entry, entry.config, lang)
            yield from load_dataset(entry.hub, config, split=entry.split,
                                    revision=entry.revision or None, streaming=True)
    except Exception as error:                     # the library's own errors have no common class
        where = ", ".join(local) or f"https://huggingface.co/datasets/{entry.hub}"
        reason = " ".join(str(error).split())[:300]              # the hub's own have empty lines
        raise ConnectionError(
            f"{where} cannot be read: {type(error).__name__}: {reason}. Is the hub reachable "
            "(HF_ENDPOINT names a mirror, HF_TOKEN an account)? --local=FILE,... reads copies"
        ) from error


def read_set(cfg, entry, lang, counts):
    """Yield the rows of ours; count rows of the set as "read", and what gave none as "unusable"."""
    with tqdm(stream(entry, lang, cfg.local), desc=cfg.name, unit="row", disable=None) as bar:
        for row in bar:
            rows, unusable = convert(entry, row, counts["read"])
            counts.update(read=1, unusable=unusable)
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
    filters.append(lambda rows, drop: islice(rows, cfg.limit))
    removed = path.with_suffix(".removed.jsonl")
    write_rows(path, read_set(cfg, entry, lang, counts), filters, counts, removed)
    if not removed.stat().st_size:
        removed.unlink()
    write_report(path.with_suffix(".json"), path, counts, {
        "licence": entry.licence, "config": asdict(cfg), "set": vars(entry)})
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
    prepare(load_config(PrepareConfig, [arg if arg.startswith("-") else f"--name={arg}"
                                        for arg in argv]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"prepare: error: {error}")
