"""Fetch public data sets into this project's formats, one command each (PAPER Table 10, Table 11).

    python -m tools.prepare --list
    python -m tools.prepare msmarco --out=data
    python -m tools.prepare miracl --lang=fi --out=data --decontaminate="mteb:MTEB(eng, v2),data/eval"
    python -m tools.prepare wikipedia --lang=km --out=data --limit=100000

Writes DIR/NAME.jsonl for train.py, DIR/NAME.json with source, licence and counts, and what
overlapped the evaluation texts (files, folders, mteb's tasks and benchmarks) as
DIR/NAME.removed.jsonl. Rows are streamed: nothing is kept but the output. A run that was stopped
goes on where it was. Needs `pip install datasets`. Licences are as their publishers state them:
read them before you train, several are for research only.
UNSPECIFIED: revisions, splits and prompts; the paper names the sets alone.
"""
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from clr import to_line
from configurator import load_config
from data import PARSERS
from tools.filters import Decontaminator, joined

SAVE_EVERY = 1000                  # source rows between two savings of the cursor
LANGUAGE_NAMES = {"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish",
                  "id": "indonesian", "ja": "japanese", "ko": "korean", "ru": "russian",
                  "sw": "swahili", "te": "telugu", "th": "thai"}          # Mr. TyDi's folders
C4_NAMES = {"he": "iw"}                                                   # the code before 1989


# ---------------------------------------------------------------- converters: row -> our rows

def _columns(value):
    """Return {key: list}; a list of structs arrives as that or as a list of dicts."""
    if isinstance(value, dict):
        return value
    return {key: [item[key] for item in value] for key in (value[0] if value else ())}


def _retrieval(query, pos, neg=()):
    row = {"query": query, "pos": [p for p in pos if p and p.strip()]}
    neg = [n for n in neg if n and n.strip() and n not in pos]
    return [row | ({"neg": neg} if neg else {})] if row["pos"] and query else []


def from_msmarco(row):
    """Return the passages an annotator selected as positives, the others shown as negatives."""
    shown = _columns(row["passages"])
    marked = list(zip(shown.get("is_selected", ()), shown.get("passage_text", ())))
    return _retrieval(row["query"], [t for s, t in marked if s], [t for s, t in marked if not s])


def from_hotpotqa(row):
    """Return the paragraphs with supporting facts as positives, the distractors as negatives."""
    context, facts = _columns(row["context"]), set(_columns(row["supporting_facts"])["title"])
    named = [(title, f"{title}\n{''.join(sentences)}") for title, sentences
             in zip(context["title"], context["sentences"])]
    return _retrieval(row["question"], [t for title, t in named if title in facts],
                      [t for title, t in named if title not in facts])


def from_squad(row):
    """Return the question and the paragraph it was asked about."""
    return _retrieval(row["question"], [f"{row['title'].replace('_', ' ')}\n{row['context']}"])


def from_pair(row):
    """Return the {query, answer} of a pair set."""
    return _retrieval(row["query"], [row["answer"]])


def from_triplet(row):
    """Return a row of {anchor, positive, negative} or of {.., negative_1, negative_2 ..}."""
    return _retrieval(row["anchor"], [row["positive"]],
                      [row[key] for key in row if key.startswith("negative")])


def from_lists(row):
    """Return a row of {query, positive: list, negative: list}."""
    return _retrieval(row["query"], row["positive"], row["negative"])


def from_flag(row):
    """Return a row of {query, pos: list, neg: list}; its own prompt is left to our template."""
    return _retrieval(row["query"], row["pos"], row["neg"])


def from_passages(row):
    """Return a row of {query, positive_passages, negative_passages}, with titles if any."""
    def texts(key):
        shown = _columns(row[key])
        titles = shown.get("title") or [""] * len(shown.get("text", ()))
        return [f"{title or ''}\n{text}".strip() for title, text in
                zip(titles, shown.get("text", ()))]
    return _retrieval(row["query"], texts("positive_passages"), texts("negative_passages"))


def from_sts(row):
    """Return {sentence1, sentence2, score}; CoSENT reads only the order of scores."""
    return [{key: row[key] for key in ("sentence1", "sentence2")} | {"score": float(row["score"])}]


def from_reviews(row):
    """Return a review with its stars as the label's text, the other stars as negatives."""
    stars = [f"{n} star{'s' if n > 1 else ''}" for n in range(1, 6)]
    label = stars[row["label"]]
    return _retrieval(row["text"], [label], [s for s in stars if s != label])


def from_mkqa(row):
    """Return the question in each of its languages: rows of a collection's queries.jsonl."""
    names = {"zh_cn": "zh"}                                       # of three, the mainland's
    return [{"id": f"{row['example_id']}/{names.get(lang, lang)}", "lang": names.get(lang, lang),
             "text": text, "answers": [a["text"] for a in row["answers"]["en"] if a["text"]]}
            for lang, text in row["queries"].items() if text and lang not in ("zh_hk", "zh_tw")]


def from_article(row):
    """Return title and text of an article as one document for pretraining."""
    return [{"text": f"{row['title'] or ''}\n{row['text']}".strip()}] if row["text"] else []


def from_news_pair(row):
    """Return a headline and its article as a pair."""
    return _retrieval(row["title"], [row["text"]])


def from_web(row):
    """Return a page's text."""
    return [{"text": row["text"]}] if row["text"] else []


# ---------------------------------------------------------------- the sets

@dataclass(frozen=True)
class PublicSet:
    """Where a set lies, how a row of it becomes rows of ours, and what a user must know of it.

    config, files: "{lang}", "{language}" and "{c4}" stand for --lang, see `named`. files: read
    these directly where the hub's own loader is a script, which `datasets` no longer runs.
    """
    hub: str
    kind: str
    convert: object
    licence: str
    size: str
    prompt: str | None = None
    config: str | None = None
    files: str | None = None
    revision: str | None = None
    split: str = "train"
    lang: str | None = None            # the default of --lang; None: one language only

    def named(self, field, lang):
        """Return `config` or `files` for a language, by the name that the set has for it.

        Raises ValueError for a language that Mr. TyDi, whose folders bear names, does not have.
        """
        given = getattr(self, field)
        if given and "{language}" in given and lang not in LANGUAGE_NAMES:
            raise ValueError(f"{self.hub} has no {lang!r}; --lang is one of "
                             f"{', '.join(LANGUAGE_NAMES)}")
        return given and given.format(lang=lang, language=LANGUAGE_NAMES.get(lang),
                                      c4=C4_NAMES.get(lang, lang))


FIND, WIKI = "Find the passage that answers the question", "Find the Wikipedia passage"
SETS = {
    "msmarco": PublicSet("microsoft/ms_marco", "retrieval", from_msmarco,
                         "MS MARCO terms: non-commercial research", "809k rows, 1.7 GB", FIND,
                         config="v2.1"),
    "nq": PublicSet("sentence-transformers/natural-questions", "pairs", from_pair,
                    "CC BY-SA 3.0", "100k rows, 44 MB", FIND),
    "hotpotqa": PublicSet("hotpotqa/hotpot_qa", "retrieval", from_hotpotqa, "CC BY-SA 4.0",
                          "90k rows, 0.3 GB", "Find the passages that together answer the question",
                          config="distractor"),
    "fever": PublicSet("BeastyZ/E5-R", "retrieval", from_lists, "CC BY-SA 3.0 (FEVER)",
                       "71k rows, 0.3 GB", "Find the passage that supports or refutes the claim",
                       config="fever"),
    "squad": PublicSet("rajpurkar/squad", "pairs", from_squad, "CC BY-SA 4.0",
                       "88k rows, 15 MB", FIND),
    "dureader": PublicSet("zyznull/dureader-retrieval-ranking", "retrieval", from_passages,
                          "Apache 2.0; republished for academic use only", "3.6 GB", FIND,
                          files="hf://datasets/zyznull/dureader-retrieval-ranking/train.jsonl.gz"),
    "t2ranking": PublicSet("hanhainebula/bge-multilingual-gemma2-data", "retrieval", from_flag,
                           "Apache 2.0 (T2Ranking); see the hub for this selection", "GBs", FIND,
                           config="zh_t2ranking"),
    "miracl": PublicSet("sentence-transformers/miracl", "retrieval", from_triplet, "Apache 2.0",
                        "16 languages, 0.9k to 4.7k rows each", WIKI, config="{lang}-triplet",
                        lang="en"),
    "mrtydi": PublicSet("castorini/mr-tydi", "retrieval", from_passages, "Apache 2.0",
                        "11 languages, 1k to 12k rows each", WIKI, lang="en",
                        files="hf://datasets/castorini/mr-tydi/mrtydi-v1.1-{language}/"
                              "train.jsonl.gz"),
    "stsb": PublicSet("sentence-transformers/stsb", "sts", from_sts,
                      "not stated; its sources differ", "5.7k rows, 0.5 MB"),
    "afqmc": PublicSet("C-MTEB/AFQMC", "sts", from_sts, "Ant Financial: academic use",
                       "34k rows, 2 MB"),
    "mkqa": PublicSet("apple/mkqa", "queries", from_mkqa, "CC BY-SA 3.0 (its hub page: CC BY 3.0)",
                      "10k questions in 24 of the languages, 20 MB", revision="refs/pr/5"),
    "amazon_reviews": PublicSet("mteb/AmazonReviewsClassification", "classification", from_reviews,
                                "Amazon's research terms: non-commercial", "200k rows, 30 MB a "
                                "language: de en es fr ja zh", "Rate the review", config="{lang}",
                                lang="en"),
    "cc_news": PublicSet("vblagoje/cc_news", "text", from_article,
                         "unknown: articles belong to their publishers", "708k rows, 1 GB"),
    "cc_news_pairs": PublicSet("vblagoje/cc_news", "pairs", from_news_pair,
                               "unknown: articles belong to their publishers", "708k rows, 1 GB",
                               "Find the article with the headline"),
    "wikipedia": PublicSet("wikimedia/wikipedia", "text", from_article, "CC BY-SA 3.0 and GFDL",
                           "en: 6.4M rows, 11 GB", config="20231101.{lang}", lang="en"),
    "mc4": PublicSet("allenai/c4", "text", from_web, "ODC-BY and Common Crawl's terms",
                     "en: 365M rows, 305 GB; 108 languages", config="{c4}", lang="en"),
}


class Stream:
    """The rows of a set, from the hub or from copies of its files, without downloading it first.

    state: what `state()` of an earlier stream returned; the rows go on from there, and files that
    were read to their end are not opened again. Raises ValueError without `datasets`,
    ConnectionError where the set cannot be read.
    """

    def __init__(self, entry, lang, local=(), state=None):
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError("public sets are read with the package datasets: `pip install "
                             "datasets`") from None
        self.where = ", ".join(local) or f"https://huggingface.co/datasets/{entry.hub}"
        try:
            if local or entry.files:
                files = list(local) or [entry.named("files", lang)]
                form = "parquet" if files[0].endswith(".parquet") else "json"
                self.rows = load_dataset(form, data_files=files, split="train", streaming=True)
            else:
                self.rows = load_dataset(entry.hub, entry.named("config", lang),
                                         split=entry.split, revision=entry.revision,
                                         streaming=True)
            if state:
                self.rows.load_state_dict(state)
        except Exception as error:          # the library's own errors have no common class
            raise self._unreadable(error) from error

    def __iter__(self):
        rows = iter(self.rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield row

    def state(self):
        """Return the place after the last row, as JSON can hold it."""
        return self.rows.state_dict()

    def _unreadable(self, error):
        said = " ".join(str(error).split())[:300]                 # the hub's own have empty lines
        return ConnectionError(
            f"{self.where} cannot be read: {type(error).__name__}: {said}. Is the hub "
            "reachable (HF_ENDPOINT names a mirror, HF_TOKEN an account)? --local=FILE,... reads "
            "copies. The same command goes on where this one stopped")


def convert(entry, row, number):
    """Return (rows of ours, how many of them are unusable); ValueError for an unknown schema."""
    try:
        made = entry.convert(row)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{entry.hub}: row {number} is not as expected ({error!r}); its columns "
                         f"are {', '.join(sorted(row))}") from error
    good = []
    for one in made:
        try:
            if entry.kind != "queries":
                PARSERS[entry.kind](one)
            good.append(one | ({"prompt": entry.prompt} if entry.prompt else {}))
        except ValueError:
            pass
    return good, len(made) - len(good) if made else 1


# ---------------------------------------------------------------- a run that can be stopped

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
        if self.name not in SETS:
            raise ValueError(f"no set {self.name!r}; there are {', '.join(SETS)}")
        if self.lang and not SETS[self.name].lang:
            raise ValueError(f"{self.name} has one language; leave out --lang={self.lang}")
        if self.lang and not self.local:
            SETS[self.name].named("files", self.lang)              # is it one of the set's?
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} must be at least 1")


class Output:
    """Two files that only grow, and a cursor that tells how far both belong together.

    What was written after the last saving of the cursor, a torn line among it, is cut off when the
    run goes on, and made again.
    """

    def __init__(self, path, identity):
        self.path, self.identity = path, identity
        self.cursor = path.with_suffix(".cursor.json")
        self.parts = [Path(f"{path}.part"), Path(f"{path.with_suffix('')}.removed.jsonl")]
        self.read, self.counts, self.state, sizes = 0, Counter(), None, [0, 0]
        if self.cursor.is_file():
            state = json.loads(self.cursor.read_text(encoding="utf-8"))
            if state["identity"] != identity:
                raise ValueError(f"{self.cursor}: belongs to a run with {state['identity']}, not "
                                 f"{identity}; delete it to start anew")
            self.read, self.counts, sizes = state["read"], Counter(state["counts"]), state["sizes"]
            self.state = state["state"]
        self.files = []
        for part, size in zip(self.parts, sizes):
            if size > (part.stat().st_size if part.is_file() else 0):
                raise ValueError(f"{part}: shorter than {self.cursor.name} says; delete both")
            self.files.append(open(part, "ab"))
            self.files[-1].truncate(size)

    def save(self, stream_state=None):
        """Write the cursor, after what it vouches for is on disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        _write_json(self.cursor, {"identity": self.identity, "read": self.read,
                                  "counts": self.counts, "state": stream_state,
                                  "sizes": [file.tell() for file in self.files]})

    def close(self):
        """Leave the parts as they are, for the next run."""
        for file in self.files:
            file.close()

    def finish(self, report):
        """Write the report and give the data its name, last of all."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        self.close()
        _write_json(self.path.with_suffix(".json"), report)
        if not self.parts[1].stat().st_size:
            self.parts[1].unlink()
        os.replace(self.parts[0], self.path)
        self.cursor.unlink(missing_ok=True)


def _write_json(path, value):
    part = Path(f"{path}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)


def prepare(cfg):
    """Write one set; return the path of its JSONL file."""
    entry = SETS[cfg.name]
    lang = cfg.lang or entry.lang
    path = Path(cfg.out) / f"{cfg.name}{f'-{lang}' if lang else ''}.jsonl"
    if path.is_file():
        print(f"{path} is there already; delete it to fetch it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = Decontaminator(joined(cfg.decontaminate)) if cfg.decontaminate else None
    output = Output(path, {"name": cfg.name, "lang": lang, "local": list(cfg.local),
                           "decontaminate": list(cfg.decontaminate)})
    try:
        fill(output, entry, lang, clean, cfg)
        counts = dict(output.counts)
        output.finish({"set": cfg.name, "hub": entry.hub, "kind": entry.kind, "lang": lang,
                       "config": entry.named("config", lang),
                       "split": entry.split, "licence": entry.licence, "limit": cfg.limit,
                       "local": list(cfg.local), "decontaminate": list(cfg.decontaminate),
                       "read": output.read, "counts": counts})
    finally:
        output.close()
    print(f"{path}: {counts.get('written', 0):,} rows ({entry.kind}) of {output.read:,} read; "
          f"licence: {entry.licence}")
    print("removed: " + (", ".join(f"{k} {n:,}" for k, n in counts.items() if k != "written")
                         or "none"))
    return path


def fill(output, entry, lang, clean, cfg):
    """Convert, compare with the evaluation texts and append, until the set or the limit ends."""
    good, removed = output.files
    stream = Stream(entry, lang, cfg.local, output.state)
    left = (cfg.limit or sys.maxsize) - output.counts["written"]
    with tqdm(stream, initial=output.read, desc=cfg.name, unit="row", disable=None) as bar:
        for row in bar:
            made, unusable = convert(entry, row, output.read)
            output.counts += Counter(unusable=unusable)
            for one in made:
                reason = clean.reason(one) if clean else None
                if left <= 0:
                    return
                output.counts[reason or "written"] += 1
                left -= not reason
                (removed if reason else good).write(
                    to_line({**one, "reason": reason} if reason else one))
            output.read += 1
            if output.read % SAVE_EVERY == 0:
                output.save(stream.state())


def show_sets():
    """Print the table of sets."""
    for name, entry in SETS.items():
        lang = f" (--lang={entry.lang})" if entry.lang else ""
        print(f"{name:<15} {entry.kind:<15} {entry.hub}{lang}\n{'':<15} {entry.size}; "
              f"licence: {entry.licence}")


def main(argv=None):
    """Fetch one set, or list them; see the module docstring."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--list" in argv:
        return show_sets()
    named = [f"--name={arg}" if not arg.startswith("-") and arg in SETS else arg for arg in argv]
    unknown = [arg for arg in named if not arg.startswith("-") and not arg.endswith(".py")]
    if unknown:
        raise ValueError(f"no set {unknown[0]!r}; there are {', '.join(SETS)}")
    prepare(load_config(PrepareConfig, named))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"prepare: error: {error}")
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
