"""Fetch public data sets into this project's formats, one command each (PAPER Table 10, Table 11).

    python -m tools.prepare --list
    python -m tools.prepare msmarco --out=data
    python -m tools.prepare miracl --lang=fi --decontaminate="mteb:MTEB(eng, v2),data/eval"
    python -m tools.prepare wikipedia --lang=km --out=data --limit=100000

Writes DIR/NAME.jsonl for train.py, DIR/NAME.json with source, licence and counts, and what
overlapped the evaluation texts (files, folders, mteb's tasks and benchmarks) as
DIR/NAME.removed.jsonl. Rows are streamed, nothing but the output is stored, and it appears whole or
not at all. Needs `pip install datasets`. docs/data.md lists the paper's sources, those missing too.
Licences are as their publishers state them: read them first, several are for research only.
UNSPECIFIED: revisions, splits and prompts; the paper names the sets alone.
"""
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from configurator import load_config
from data import PARSERS, document_text
from engine.jsonl import atomic, to_line
from tools.filters import Decontaminator, join_names

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
    pos = [pos] if isinstance(pos, str) else pos or []         # one text or a list of them
    neg = [neg] if isinstance(neg, str) else neg or []
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
    named = [(title, document_text({"title": title, "text": "".join(sentences)}))
             for title, sentences in zip(context["title"], context["sentences"])]
    return _retrieval(row["question"], [t for title, t in named if title in facts],
                      [t for title, t in named if title not in facts])


def from_squad(row):
    """Return the question and the paragraph it was asked about."""
    return _retrieval(row["question"], document_text({"title": row["title"].replace("_", " "),
                                                      "text": row["context"]}))


def from_pair(row):
    """Return the {query, answer} of a pair set."""
    return _retrieval(row["query"], row["answer"])


def from_triplet(row):
    """Return a row of {anchor, positive, negative} or of {.., negative_1, negative_2 ..}."""
    return _retrieval(row["anchor"], row["positive"],
                      [row[key] for key in row if key.startswith("negative")])


def from_lists(row):
    """Return a row of {query, positive, negative}, each a text or a list."""
    return _retrieval(row["query"], row["positive"], row["negative"])


def from_flag(row):
    """Return a row of {query, pos, neg}; its own prompt is left to our template."""
    return _retrieval(row["query"], row["pos"], row["neg"])


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
    """Return title and text of an article as one document for pretraining."""
    return [{"text": document_text(row)}] if row["text"] else []


def from_titled(row):
    """Return the title of an article and its text as a pair (PAPER Table 10: title, content)."""
    return _retrieval(row["title"], row["text"])


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
    "triviaqa": PublicSet("sentence-transformers/trivia-qa", "pairs", from_pair,
                          "not stated: research", "73k rows, 30 MB", FIND, config="pair"),
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
    "cc_news_pairs": PublicSet("vblagoje/cc_news", "pairs", from_titled,
                               "unknown: articles belong to their publishers", "708k rows, 1 GB",
                               "Find the article with the headline"),
    "wikipedia": PublicSet("wikimedia/wikipedia", "text", from_article, "CC BY-SA 3.0 and GFDL",
                           "en: 6.4M rows, 11 GB", config="20231101.{lang}", lang="en"),
    "wikipedia_pairs": PublicSet("wikimedia/wikipedia", "pairs", from_titled,
                                 "CC BY-SA 3.0 and GFDL", "en: 6.4M rows, 11 GB",
                                 "Find the article with the title", config="20231101.{lang}",
                                 lang="en"),
    "mc4": PublicSet("allenai/c4", "text", from_web, "ODC-BY and Common Crawl's terms",
                     "en: 365M rows, 305 GB; 108 languages", config="{c4}", lang="en"),
}
# MTEB's own copies of older sets. STS12 has a train split; of the others nothing but the test split
# exists, which MTEB evaluates on: train on those only if you do not score them.
SETS |= {f"sts{year}": PublicSet(f"mteb/sts{year}-sts", "sts", from_sts,
                                 "not stated; its sources differ", size, split=split)
         for year, size, split in ((12, "2.2k rows, 0.3 MB", "train"), (13, "1.5k rows", "test"),
                                   (14, "3.8k rows", "test"), (15, "3k rows", "test"),
                                   (16, "1.2k rows", "test"))}
SETS["sts22"] = PublicSet("mteb/sts22-crosslingual-sts", "sts", from_sts,
                          "not stated: news articles", "4.6k rows, 18 language pairs",
                          config="{lang}", lang="en")
SETS |= {name: PublicSet(f"mteb/{hub}", "labels", from_labels, licence, size, config=config,
                         lang=config and "en")
         for name, hub, licence, size, config in (
             ("banking77", "banking77", "CC BY 4.0", "10k rows, 77 intents", None),
             ("emotion", "emotion", "not stated: research", "16k rows, 6 emotions", None),
             ("imdb", "imdb", "not stated", "25k rows, 2 labels", None),
             ("toxic", "toxic_conversations_50k", "CC BY 4.0", "50k rows, 2 labels", None),
             ("tweets", "tweet_sentiment_extraction", "CC BY 4.0", "27k rows, 3 labels", None),
             ("amazon_counterfactual", "amazon_counterfactual", "CC BY 4.0",
              "4k rows, 2 labels: de en ja", "{lang}"),
             ("massive_intent", "amazon_massive_intent", "Apache 2.0",
              "11.5k rows, 60 intents, 51 languages", "{lang}"),
             ("massive_scenario", "amazon_massive_scenario", "Apache 2.0",
              "11.5k rows, 18 scenarios, 51 languages", "{lang}"),
             ("mtop_intent", "MTOPIntentClassification", "not stated", "16k rows, 113 intents",
              "{lang}"),
             ("mtop_domain", "MTOPDomainClassification", "not stated", "16k rows, 11 domains",
              "{lang}"))}


class Stream:
    """The rows of a set, from the hub or from copies of its files, without downloading it first.

    Raises ValueError without `datasets`, ConnectionError where the set cannot be read.
    """

    def __init__(self, entry, lang, local=()):
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

    def _unreadable(self, error):
        said = " ".join(str(error).split())[:300]                 # the hub's own have empty lines
        return ConnectionError(
            f"{self.where} cannot be read: {type(error).__name__}: {said}. Is the hub "
            "reachable (HF_ENDPOINT names a mirror, HF_TOKEN an account)? --local=FILE,... reads "
            "copies")


def convert(entry, row, number):
    """Return (rows of ours, how many of them are unusable); ValueError for an unknown schema."""
    try:
        rows = entry.convert(row)
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
        if self.name not in SETS:
            raise ValueError(f"no set {self.name!r}; there are {', '.join(SETS)}")
        if self.lang and not SETS[self.name].lang:
            raise ValueError(f"{self.name} has one language; leave out --lang={self.lang}")
        if self.lang and not self.local:
            SETS[self.name].named("files", self.lang)              # is it one of the set's?
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} must be at least 1")


def converted(cfg, entry, lang, counts):
    """Yield (row of ours, reason to set it aside or None), until the set or the limit ends."""
    clean = Decontaminator(join_names(cfg.decontaminate)) if cfg.decontaminate else None
    with tqdm(Stream(entry, lang, cfg.local), desc=cfg.name, unit="row", disable=None) as bar:
        for row in bar:
            rows, unusable = convert(entry, row, counts["read"])
            counts.update({"read": 1, "unusable": unusable})
            for one in rows:
                reason = clean.reason(one) if clean else None
                counts[reason or "written"] += 1
                yield one, reason
                if counts["written"] == cfg.limit:
                    return


def prepare(cfg):
    """Write one set; return the path of its JSONL file."""
    entry = SETS[cfg.name]
    lang, counts = cfg.lang or entry.lang, Counter()
    path = Path(cfg.out) / f"{cfg.name}{f'-{lang}' if lang else ''}.jsonl"
    if path.is_file():
        print(f"{path} exists already; delete it to fetch it again")
        return path
    removed = path.with_suffix(".removed.jsonl")
    with atomic(path, "wb") as good, atomic(removed, "wb") as aside:
        for row, reason in converted(cfg, entry, lang, counts):
            (aside if reason else good).write(to_line(row | {"reason": reason} if reason else row))
        counts = {key: n for key, n in counts.items() if n}
        with atomic(path.with_suffix(".json")) as file:
            json.dump({"set": cfg.name, "hub": entry.hub, "kind": entry.kind, "lang": lang,
                       "config": entry.named("config", lang), "split": entry.split,
                       "licence": entry.licence, "limit": cfg.limit, "local": list(cfg.local),
                       "decontaminate": list(cfg.decontaminate), "read": counts.pop("read", 0),
                       "counts": counts}, file, indent=1, ensure_ascii=False)
    if not removed.stat().st_size:
        removed.unlink()
    print(f"{path}: {counts.pop('written', 0):,} rows ({entry.kind}); licence: {entry.licence}")
    print("removed: " + (", ".join(f"{k} {n:,}" for k, n in counts.items()) or "none"))
    return path


def show_sets():
    """Print the table of sets."""
    for name, entry in SETS.items():
        lang = f" (--lang={entry.lang})" if entry.lang else ""
        print(f"{name:<16} {entry.kind:<15} {entry.hub}{lang}\n{'':<16} {entry.size}; "
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
        print("prepare: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
