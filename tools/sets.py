"""Turn a folder of public sets into the data folder of a run (PAPER Sec. 3.1, Table 10, 11).

    python -m tools.sets --root=FOLDER --out=out/real/sets
    python train.py config/real/embed_sup.py                    # reads out/real/sets

Every folder below FOLDER is a set. Its files (.jsonl, .ndjson, also .gz) tell what it is:

    corpus, queries, qrels                  a collection: question -> passage; no other file is read
    rows with query, pos, lang_q, lang_p    bitext
    rows with query, pos, neg?, prompt?     question -> passage, as tools.prepare writes them
    rows with id, lang, text                parallel sentences: equal ids are translations
    docs (id, doc) beside those             sentences of a document in order: sentence -> paragraph
    rows with sentence1, sentence2, score   STS; with label 0 / 1: paraphrases
    rows with text, label                   classification
    rows with id, title, text               documents: title -> text; equal ids are translations
    rows with text, keywords                documents: keywords -> text
    rows with text                          running text; a title is not read

Questions, passages, documents and paraphrases have a `lang`; without one they are English. Only
rows of split "train", or of none, are trained on, and no file or folder named dev, validation or
test, or *_test, *-test and so on. A collection in such a folder is copied to OUT, where the
evaluation looks. Of bitext, parallel sentences and paraphrases without a split a share is held out
and written to OUT/held_out in the same format: by passage, by document of `docs`, and by id or
first sentence. A set with files of several forms holds nothing out: one may repeat the sentences of
another. Where a question has a passage in another language, questions with ids LANG/NAME (or
NAME/LANG) of one NAME are translations. Professional translations stand in for machine ones in CLR:
the query's language differs from the passage's.
"""
import argparse
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from configurator import run_command
from data import parse_pair
from engine.collection import (FOR_EVALUATION, check_label, check_score, document_text,
                               load_collection)
from engine.index import text_id
from engine.jsonl import read_jsonl, write_jsonl

HELD_OUT_SHARE = 5                 # one in five of what carries no split is held out
WINDOW = 4                         # sentences of a paragraph that is cut from a document
MAX_CHARS = 1200                   # of a passage: more than any passage_len here reads
LETTERS = 8                        # of a sentence that is cut from its passage, at least
SUPERVISED = 500                   # rows of a set in stage 4: few enough to come back under DHNM
SMALLEST = 512                     # pairs of a file; smaller ones share one
LABELS_AS_NEGATIVES = 15           # other labels of a classification row
TYPES = {"id": (str, int), "label": (str, int), "score": (int, float),    # all others: str
         **dict.fromkeys(("pos", "title", "keywords"), object)}           # checked elsewhere
SUFFIX = re.compile(r"\.(jsonl|ndjson)(\.gz)?$", re.IGNORECASE)


def for_training(rows):
    """Return the rows of split "train" and those of none."""
    return [row for row in rows if (row.get("split") or "train") == "train"]


def check_head(row):
    """Raise ValueError for a document whose summary or keywords are no text."""
    words = row.get("keywords") or []
    for text in (row.get("summary") or "", *(words if isinstance(words, list) else [words])):
        if not isinstance(text, str):
            raise ValueError(f"summary and keywords must be text, not {text!r}")


def check_row(row, form_check=None):
    """Raise ValueError for an id or a label of another type, and as the form's own check does."""
    for key in ("id", "label"):
        if not isinstance(row.get(key), (str, int, type(None))):
            raise ValueError(f"key {key!r} must be str or int, not {type(row[key]).__name__}")
    if form_check:
        form_check(row)


def language(row):
    """Return the language of a row; one that names none is English, as in BEIR's collections."""
    return row.get("lang") or "en"


class Builder:
    """Collects rows of every kind from set after set; `files` maps kind to rows.

    name, file: the set and the file that are being read. document_of: {id: document} of the set.
    is_mixed: whether the set has files of several forms.
    """

    def __init__(self, out):
        self.out, self.rng = Path(out), random.Random(0)
        self.files = defaultdict(list)
        self.name, self.file, self.document_of, self.is_mixed = "", "", {}, False

    def text(self, text):
        """Take a document of stage 1."""
        if text.strip():
            self.files["text"].append({"text": text})

    def add(self, kind, query, passage, form="", **rest):
        """Take a row {query, pos}; a query equal to its passage teaches nothing.

        Pairs go to a file for each set and passage language, since a batch is taken from one file:
        negatives of one origin cannot be told from the positive by their language or their topic.
        Bitext into English has a file for each language, so that languages can be weighted.
        """
        if query.strip() and passage.strip() and query != passage:
            if kind == "pairs":
                kind = f"pairs/{self.name}-{form}{rest['lang_p']}"
                kind += f"-{rest['lang_q']}" if form + rest["lang_p"] == "bitext-en" else ""
            self.files[kind].append({"query": query, "pos": [passage[:MAX_CHARS]], **rest})

    def ask(self, query, passage, lang_q, lang_p):
        """Take a question: in one language it is retrieval, across languages CLR; pairs as well."""
        for kind in ("pairs", "retrieval" if lang_q == lang_p else "clr"):
            self.add(kind, query, passage, lang_q=lang_q, lang_p=lang_p)

    def bitext(self, left, right, lang_l, lang_r):
        """Take a pair of translations, asked in a direction drawn by chance; no instruction.

        PAPER abstract: pretraining reads multilingual pairs. So a pair is a document as well.
        """
        if self.rng.random() < 0.5:
            left, right, lang_l, lang_r = right, left, lang_r, lang_l
        self.add("pairs", left, right, "bitext-", prompt="", lang_q=lang_l, lang_p=lang_r)
        if lang_l != lang_r:
            self.text(f"{left}\n{right}")

    def crop(self, text, lang):
        """Take a sentence of a passage and what is left of it: the pair that any text gives."""
        parts = list(filter(None, re.split(r"(?<=[.!?؟।])\s+|(?<=[。！？])\s*", text)))
        whole = [i for i, part in enumerate(parts) if sum(map(str.isalpha, part)) >= LETTERS]
        if len(parts) >= 3 and whole and lang:
            i = self.rng.choice(whole)
            self.add("pairs", parts[i], " ".join(parts[:i] + parts[i + 1:]), "crop-", lang_q=lang,
                     lang_p=lang, prompt=None)

    def hold_out(self, rows, key):
        """Return the rows to train on; write one in `HELD_OUT_SHARE`, by the hash of `key`(row)."""
        if self.is_mixed:
            return rows
        train, held_out = [], []
        for row in rows:
            (train if text_id(str(key(row))) % HELD_OUT_SHARE else held_out).append(row)
        if held_out:
            write_jsonl(self.out / "held_out" / self.name / f"{self.file}.jsonl", held_out)
        return train

    def to_train_on(self, rows, key):
        """Return the rows of split train; where no row has a split, what `hold_out` leaves."""
        return for_training(rows) if any(row.get("split") for row in rows) else \
            self.hold_out(rows, key)

    def check_new(self, texts, row):
        """Raise ValueError if a language has this row's id already: which text is whose?"""
        if "id" in row and language(row) in texts.get(row["id"], ()):
            raise ValueError(f"{self.name}/{self.file}: id {row['id']!r} comes twice in "
                             f"{language(row)!r}; equal ids are translations")

    def join_small(self):
        """Put files of too few pairs together: bitext into English by set, then all the rest."""
        for joint in (lambda kind: re.sub("(-bitext-en)-.*", r"\1", kind),
                      lambda kind: "pairs/others"):
            for kind in [kind for kind in self.files if kind.startswith("pairs/")]:
                if len(self.files[kind]) < SMALLEST:
                    rows = self.files.pop(kind)
                    self.files[joint(kind)] += rows

    # ------------------------------------------------------------ one method for each form

    def collection(self, folder):
        """Take questions and their passages; a question in several languages is bitext."""
        collection = load_collection(folder, "train" if (folder / "qrels").is_dir() else None)
        documents = {row["id"]: row for row in collection.corpus}
        queries = for_training(collection.queries)
        same, crossing = defaultdict(list), False
        for row in queries:
            parts = [part for part in row["id"].split("/") if part != language(row)]
            same["/".join(parts)].append(row)
            for key, score in collection.qrels.get(row["id"], {}).items():
                if score > 0:
                    passage = documents[key]
                    crossing |= language(passage) != language(row)
                    self.ask(row["text"], document_text(passage), language(row), language(passage))
        for rows in same.values() if crossing else ():
            for i, row in enumerate(rows):
                for other in rows[:i]:
                    if language(other) != language(row):
                        self.bitext(row["text"], other["text"], language(row), language(other))
        for row in for_training(collection.corpus):
            self.text(document_text(row))
            self.crop(row["text"], language(row))
        for row in queries:
            self.text(row["text"])

    def bitext_rows(self, rows):
        """Take {query, pos, lang_q, lang_p}; held out by the passage side."""
        rows = [row | {"pos": parse_pair(row)["pos"][0]} for row in rows]
        for row in self.to_train_on(rows, lambda row: row["pos"]):
            self.bitext(row["query"], row["pos"], row["lang_q"], row["lang_p"])
            self.text(row["query"])

    def questions(self, rows):
        """Take {query, pos, neg?, prompt?} of one language."""
        for row in for_training(rows):
            pair = {key: value for key, value in parse_pair(row).items()
                    if value or (key, value) == ("prompt", "")}
            self.files[f"pairs/{self.name}"].append(pair)
            self.files["retrieval"].append(pair)
            for text in pair["pos"]:
                self.text(text)

    def parallel(self, rows):
        """Take {id, lang, text}: each sentence with English and with one other language.

        With docs whole documents are held out, and a sentence also asks for the paragraph around
        it in another language: one half of the time in English.
        """
        documents, texts = self.document_of, defaultdict(dict)
        choose = self.hold_out if documents else self.to_train_on
        rows = for_training(choose(rows, lambda row: documents.get(row["id"], row["id"])))
        for row in rows:
            self.check_new(texts, row)
            texts[row["id"]][row["lang"]] = row["text"]
            self.text(row["text"])
        for key, by_language in texts.items():
            for lang, text in by_language.items():
                others = sorted(by_language.keys() - {lang, "en"})
                for other in [*self.rng.sample(others, min(1, len(others))),
                              *(["en"] if "en" in by_language and lang != "en" else [])]:
                    self.bitext(text, by_language[other], lang, other)
                target = "en" if (self.rng.random() < 0.5 or not others) and lang != "en" else \
                    self.rng.choice(others or [lang])
                crossing = key in documents and target in by_language and target != lang
                for kind in ("pairs", "clr") if crossing else ():
                    self.add(kind, text, self.paragraph(texts, key, target), lang_q=lang,
                             lang_p=target)
        if rows and "label" in rows[0]:
            self.labels(rows)

    def paragraph(self, texts, key, lang):
        """Return up to `WINDOW` neighbouring sentences of one document, `key` among them."""
        first, document_of = key - self.rng.randrange(WINDOW), self.document_of
        return " ".join(texts[i][lang] for i in range(first, first + WINDOW)
                        if document_of.get(i) == document_of[key] and lang in texts.get(i, ()))

    def sts(self, rows):
        """Take scored pairs; equal ids in two languages give bitext and cross-lingual pairs."""
        same, seen = defaultdict(list), defaultdict(set)
        for row in for_training(rows):
            if not (row["sentence1"].strip() and row["sentence2"].strip()):
                continue
            self.files[f"sts/{self.name}"].append(
                {k: row[k] for k in ("sentence1", "sentence2", "score")})
            self.text(row["sentence1"])
            same[row.get("id", id(row))].append(row)
            if row.get("lang"):
                self.check_new(seen, row)
                seen[row.get("id")].add(row["lang"])
        for group in same.values():
            for row in group:
                others = [other for other in group if other.get("lang") != row.get("lang")]
                for other in self.rng.sample(others, min(2, len(others))):
                    self.bitext(row["sentence1"], other["sentence1"], row["lang"], other["lang"])
                if others:
                    other = self.rng.choice(others)
                    self.bitext(row["sentence2"], other["sentence2"], row["lang"], other["lang"])
                    self.files[f"sts/{self.name}"].append({
                        "sentence1": row["sentence1"], "score": row["score"],
                        "sentence2": other["sentence2"]})

    def paraphrases(self, rows):
        """Take {sentence1, sentence2, label}: 1 is a pair, 0 is left out."""
        train = self.to_train_on(rows, lambda row: row.get("id", row["sentence1"]))
        chosen = set(map(id, train))
        held_out = {row[key] for row in rows if id(row) not in chosen
                    for key in ("sentence1", "sentence2")}
        for row in train:
            if {row["sentence1"], row["sentence2"]} & held_out:
                continue                           # a pair may share one sentence with another
            self.text(row["sentence1"])
            if row["label"] == 1:
                self.bitext(row["sentence1"], row["sentence2"], language(row), language(row))

    def labels(self, rows):
        """Take {text, label}: the label's text is the positive, other labels the negatives."""
        def readable(label):                       # science/technology, credit_score
            return re.sub(r"[_/]", " ", str(label))

        rows = [row for row in for_training(rows) if row["text"].strip()]
        names = sorted({row["label"] for row in rows}, key=str)
        for row in rows:
            others = [label for label in names if label != row["label"]]
            others = self.rng.sample(others, min(LABELS_AS_NEGATIVES, len(others)))
            self.files["classification"].append({
                "query": row["text"], "pos": [readable(row["label"])],
                "neg": [readable(label) for label in others]})
            if not {"id", "lang"} <= row.keys():   # parallel sentences have come as text already
                self.text(row["text"])

    def documents(self, rows):
        """Take documents: title (and summary, or keywords) -> text, also across languages."""
        by_language = defaultdict(dict)
        for row in for_training(rows):
            words = row.get("keywords") or ()
            head = ". ".join(filter(None, (row.get("title"), row.get("summary")))) \
                or (words if isinstance(words, str) else " ".join(words))
            self.text(document_text({"title": head, "text": row["text"]}))
            self.crop(row["text"], language(row))
            if head:
                self.check_new(by_language, row)
                by_language[row.get("id", row["text"])][language(row)] = (head, row["text"])
        for languages in by_language.values():
            for lang, (head, text) in languages.items():
                self.ask(head, text, lang, lang)
                others = sorted(languages.keys() - {lang})
                if others:
                    other = "en" if "en" in others else self.rng.choice(others)
                    self.bitext(head, languages[other][0], lang, other)
                    self.ask(head, languages[other][1], lang, other)

    def running_text(self, rows):
        """Take {text}: for the language model, and crops of it."""
        for row in for_training(rows):
            self.text(row["text"])
            for start in range(0, len(row["text"]), MAX_CHARS):
                self.crop(row["text"][start:start + MAX_CHARS], row.get("lang"))

    # ------------------------------------------------------------ which form it is

    FORMS = ((bitext_rows, {"query", "pos", "lang_q", "lang_p"}, parse_pair),
             (questions, {"query", "pos"}, parse_pair),
             (sts, {"sentence1", "sentence2", "score"}, check_score),
             (paraphrases, {"sentence1", "sentence2", "label"}, check_label),
             (documents, {"text", "title", "id"}, check_head),
             (documents, {"text", "keywords"}, check_head),
             (parallel, {"id", "lang", "text"}), (labels, {"text", "label"}),
             (running_text, {"text"}))             # the first whose keys are there

    def read(self, folder):
        """Take one set, each of its files by its form; stage 4 takes `SUPERVISED` rows at most.

        Raises ValueError by file for an unknown form, and for a key that is missing.
        """
        self.name, self.file, files = folder.name, "", files_of(folder)
        before = {kind: len(self.files[kind]) for kind in ("retrieval", "clr", "classification")}
        try:
            if {"corpus", "queries"} <= files.keys():
                self.collection(folder)
                files = {}
            docs = read_jsonl(files.pop("docs"), {"id": int, "doc": str}) if "docs" in files else ()
            self.document_of = {row["id"]: row["doc"] for row in docs}
            forms = {path: self.form_of(path) for path in files.values()}
            self.is_mixed = len({form for form, *_ in forms.values()}) > 1
            for self.file, path in files.items():
                form, needed, *check = forms[path]
                required = {key: TYPES.get(key, str) for key in sorted(needed)}
                form(self, [{key: value for key, value in row.items() if value is not None}
                            for row in read_jsonl(path, required, lambda r: check_row(r, *check))])
        except KeyError as error:
            raise ValueError(f"{files.get(self.file, folder)}: a row has no key {error}") from None
        for kind, start in before.items():
            rows = self.files[kind][start:]
            self.files[kind][start:] = self.rng.sample(rows, min(len(rows), SUPERVISED))

    def form_of(self, path):
        """Return the entry of `FORMS` for a file, by its first row; ValueError if there is none."""
        columns = columns_of(path)
        for entry in self.FORMS:
            if entry[1] <= columns:
                return entry
        raise ValueError(f"{path}: no rows" if not columns else
                         f"{path}: rows with {sorted(columns)} have none of the known forms, see "
                         "`python -m tools.sets --help`")


def files_of(folder):
    """Return {name without suffix: JSONL file} of a set, those of its held-out splits excepted.

    Raises ValueError where two files differ in their suffixes alone.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        name = SUFFIX.sub("", path.name)
        if path.is_file() and name != path.name and not FOR_EVALUATION.search(name):
            if name in files:
                raise ValueError(f"{path}: there is another file {name} with another suffix")
            files[name] = path
    return files


def held_out_collections(root):
    """Return the collections of `root` that nothing was trained on, by their folders' names."""
    return sorted({path.parent for path in Path(root).glob("*/qrels*")
                   if FOR_EVALUATION.search(path.parent.name)})


def columns_of(path):
    """Return the keys of a file's first row."""
    return next(iter(read_jsonl(path)), {}).keys()


def build(root, out):
    """Build the files of `root`'s sets in `out`; return {kind: rows}.

    `out` appears when all is built. Raises ValueError if it holds files already.
    """
    root, out = Path(root), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; delete it, or choose another --out")
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not any(files_of(folder) for folder in folders):
        raise ValueError(f"{root}: no folder with sets in it (.jsonl or .jsonl.gz files)")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)        # of a build that broke off
    part.mkdir(parents=True)
    builder = Builder(part)
    for folder in tqdm(folders, desc="sets", unit="set"):
        if not FOR_EVALUATION.search(folder.name):
            builder.read(folder)
    builder.join_small()
    files = {kind: rows for kind, rows in builder.files.items() if rows}
    for kind, rows in files.items():
        builder.rng.shuffle(rows)
        write_jsonl(part / f"{kind}.jsonl", rows)
    for folder in held_out_collections(root):
        shutil.copytree(folder, part / folder.name)
    part.rename(out)
    return files


def main():
    """Build the files and print how many rows each has."""
    parser = argparse.ArgumentParser(prog="python -m tools.sets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with one folder for each set")
    parser.add_argument("--out", default="out/real/sets", help="must not exist (%(default)s)")
    args = parser.parse_args()
    for kind, rows in sorted(build(args.root, args.out).items()):
        print(f"{args.out}/{kind}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    run_command(main)
