"""Files of evaluation: collections as BEIR publishes them, and rows by split and language.

A collection has corpus.jsonl, queries.jsonl and qrels. Each file may be plain or .gz; ids are `id`
or `_id`; qrels are qrels.tsv or qrels/SPLIT.tsv, with a header or without. Every error names file
and line. eval.py scores them.
"""
import glob
import importlib.util
import math
import re
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from engine.jsonl import is_json, lines_of, read_jsonl

HELD_OUT = ("test", "dev", "validation")           # the split that is scored, the first one there
FOR_EVALUATION = re.compile(       # in names, without suffix: nothing is trained on
    rf"(^|[._-])({'|'.join(HELD_OUT)})$", re.IGNORECASE)
# A file or folder of such a name is called after the folder it is in: my_set/data.jsonl.gz.
PLAIN_NAMES = ("data", "rows", "pairs", "bitext", "sentences", "titles", "train", *HELD_OUT)
SENTENCES = {"sentence1": str, "sentence2": str}
VALIDATION_TEXTS = 200             # held-out examples that an LM stage is measured on
TEST_FILES = {"sts": "sts_test.jsonl", "classification": "labels_test.jsonl"}   # of a run's data
VALIDATION_FILE = "text_dev.jsonl"
COLUMNS = {                        # what a task's rows must have
    "bitext": {"query": str, "pos": (str, list)},
    "aligned": {"id": (str, int), "lang": str, "text": str},       # the other form of bitext
    "sts": {**SENTENCES, "score": (int, float)},
    "pair_classification": {**SENTENCES, "label": int},
    "classification": {"text": str, "label": (str, int), "split": str},
}


@dataclass
class Collection:
    """A retrieval collection: rows with ids, and qrels {query id: {document id: relevance}}.

    split: the name of the qrels, None where rows name it. without_self: ids of queries whose
    ranking leaves out the document of the same id.
    """
    corpus: list
    queries: list
    qrels: dict
    split: str | None = None
    without_self: frozenset = frozenset()


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
        key = row.get("id", row.get("_id"))
        if not isinstance(key, str):
            raise ValueError(f"{path}:{number}: id or _id must be a string, not {key!r}; the keys "
                             f"are {sorted(row)[:8]}")
        if key in seen:
            raise ValueError(f"{path}:{number}: id {key!r} comes twice")
        seen.add(key)
        yield {**row, "id": key}


def find_packed(path):
    """Return a file or its .gz, whichever is there; FileNotFoundError by name without either."""
    for file in (Path(path), Path(f"{path}.gz")):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}: no such file (nor {Path(path).name}.gz)")


def find_qrels(directory, split=None):
    """Return (file, split or None) of a folder's qrels.tsv or, as in BEIR, qrels/SPLIT.tsv.

    Of several splits, the one that is named or the first of HELD_OUT.
    """
    splits = [(f"qrels/{name}.tsv", name) for name in ([split] if split else HELD_OUT)]
    whole = [("qrels.tsv", None)]                      # of all splits, so a named one goes before
    for name, of_file in splits + whole if split else whole + splits:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path, of_file
    there = sorted({path.name.partition(".")[0] for path in (directory / "qrels").glob("*.tsv*")})
    raise FileNotFoundError(f"{directory / 'qrels.tsv'}: no such file, nor {splits[0][0]}; "
                            f"the splits in qrels/ are {there}")


def read_qrels(path, queries, documents):
    """Return {query id: {document id: relevance}} of a file, plain or .gz.

    Three columns and a header or none, or TREC's four; blank lines at the end are passed over.
    queries, documents: the known ids. Raises ValueError by file and line, for any other id too.
    """
    qrels = {}
    for number, line in lines_of(path):
        try:
            cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            if number == 1 and cells[-1].strip() == "score":
                continue
            query, *_, document, score = cells             # _: TREC's second column
            score = float(score)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        except ValueError:
            raise ValueError(f"{path}:{number}: query-id, corpus-id and a number are needed, not "
                             f"{str(line[:80])[2:-1]}") from None
        if not math.isfinite(score):
            raise ValueError(f"{path}:{number}: the score {score} is not finite")
        for kind, key, known in (("query", query, queries), ("document", document, documents)):
            if key not in known:
                raise ValueError(f"{path}:{number}: unknown {kind} {key!r}")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{path}:{number}: query {query!r} and document {document!r} have "
                             f"two scores, {qrels[query][document]} and {score}")
    return qrels


def load_collection(directory, split=None, ignore_identical_ids=None):
    """Read the corpus.jsonl, queries.jsonl and qrels of a folder, each plain or .gz.

    split: one of qrels/SPLIT.tsv, or the queries whose row says `"split": split`, or says none in a
    folder of that name. Queries without a judged document are left out, unless their row has
    `answers`. ignore_identical_ids: leave the document with a query's own id out of its ranking;
    None: where the texts are equal and the document is not judged relevant, as in ArguAna. Raises
    ValueError by file and line.
    """
    directory = Path(directory)
    corpus = list(read_with_ids(find_packed(directory / "corpus.jsonl")))
    queries = list(read_with_ids(find_packed(directory / "queries.jsonl")))
    for row in queries:
        answers = row.get("answers")
        if answers is not None and (not isinstance(answers, list) or not all(
                isinstance(answer, str) for answer in answers)):
            raise ValueError(f"{directory}: the answers of query {row['id']!r} must be strings in "
                             "a list")
    texts, qrels, of_file = {row["id"]: row["text"] for row in corpus}, {}, None
    try:
        path, of_file = find_qrels(directory, split)
        qrels = read_qrels(path, {row["id"] for row in queries}, texts)
    except FileNotFoundError:
        if not any(row.get("answers") for row in queries):
            raise
    queries = [row for row in queries if (qrels.get(row["id"]) or row.get("answers"))
               and (of_file or not split or row.get("split", directory.name) == split)]
    if not queries:
        raise ValueError(f"{directory}: no query{f' of split {split!r}' if split else ''} has a "
                         "judged document")
    same = [row["id"] for row in queries] if ignore_identical_ids else []
    if ignore_identical_ids is None:
        same = [row["id"] for row in queries if texts.get(row["id"]) == row["text"]
                and qrels.get(row["id"], {}).get(row["id"], 0) <= 0]
        if same:
            warnings.warn(f"{directory}: {len(same)} queries are documents too, {same[0]!r} first; "
                          "each is left out of its own ranking (ignore_identical_ids=false keeps "
                          "them)", stacklevel=2)
    return Collection(corpus, queries, qrels, of_file, frozenset(same))


# ---------------------------------------------------------------- rows by split and language

def set_name(path):
    """Name a set after its file or folder.

    >>> set_name("shared/jsts/data.jsonl.gz"), set_name("my.sts.jsonl"), set_name("docs/test")
    ('jsts', 'my.sts', 'docs')
    """
    path = Path(path).resolve()
    name = path.name.removesuffix(".gz")
    for suffix in (".jsonl", ".ndjson", ".json", ".txt"):
        name = name.removesuffix(suffix)
    return path.parent.name if name in PLAIN_NAMES else name


def languages_in(rows):
    """Return the sorted `lang` values of rows; rows without one do not count."""
    return sorted({row["lang"] for row in rows if row.get("lang")})


def choose_split(rows, split, path, with_train=False):
    """Return (the rows of a split, its name): `split`, or the first of HELD_OUT that is there.

    Where no split is asked for, rows with none, or none of those, are all taken, as "all".
    `with_train` keeps the rows of "train" besides. Raises ValueError if a split is not there.
    """
    there = {row["split"] for row in rows if row.get("split")}
    if split and not there and Path(path).name != split:
        raise ValueError(f"{path}: no rows of split {split!r}, as none has a split")
    chosen = split or next((name for name in HELD_OUT if name in there), None)
    if not there or chosen is None and not with_train:
        return rows, "all"
    wanted = {chosen or "test"} | ({"train"} if with_train else set())
    if not wanted <= there:
        raise ValueError(f"{path}: no rows of split {sorted(wanted - there)}, only {sorted(there)}")
    return [row for row in rows if row.get("split") in wanted], chosen


def scored_collection(directory, split=None, ignore_identical_ids=None):
    """Return (the collection with the queries of the split that is scored, the split's name)."""
    collection = load_collection(directory, split, ignore_identical_ids)
    if collection.split:
        return collection, collection.split
    queries, name = choose_split(collection.queries, split, directory)
    return replace(collection, queries=queries), name


def check_score(row):
    """Raise ValueError for a row whose score is missing, no number or no finite float32."""
    score = row.get("score")
    if type(score) not in (int, float) or not abs(score) < 3e38:
        raise ValueError(f"key 'score' must be a finite number (float32), not {str(score)[:40]}; "
                         f"the keys are {sorted(row)[:8]}")


def check_label(row):
    """Raise ValueError for two sentences whose label is neither 0 nor 1."""
    if row["label"] not in (0, 1):
        raise ValueError(f"key 'label' must be 0 or 1, not {row['label']!r}")


def read_groups(task, path, split=None):
    """Return {language or pair of them: rows} of a file; {split: rows} if some rows have none.

    Raises ValueError for a bad row, by file and line, and for a split that is not there.
    """
    aligned = task == "bitext" and "query" not in next(iter(read_jsonl(path)), ())
    check = {"sts": check_score, "pair_classification": check_label}.get(task)
    rows = list(read_jsonl(path, COLUMNS["aligned" if aligned else task], check))
    if not rows:
        raise ValueError(f"{path}: no rows")
    rows, subset = choose_split(rows, split, path, task == "classification")
    if task == "bitext":
        return pair_groups(align(rows, path) if aligned else rows, subset, path)
    groups = {subset: rows} if not all(row.get("lang") for row in rows) else \
        {lang: [row for row in rows if row["lang"] == lang] for lang in languages_in(rows)}
    for name, part in groups.items() if task == "classification" else ():
        labels = [row["label"] for row in part if row["split"] == "train"]
        if len(set(map(str, labels))) < 2 or len(labels) == len(part):
            raise ValueError(f"{path}: {name!r} needs rows of two labels to fit, with split "
                             '"train", and others to score')
    return groups


def pair_groups(rows, subset, path):
    """Group {query, pos, lang_q?, lang_p?} by language pair; pos: a string, or a list of one."""
    groups = {}
    for row in rows:
        pos = [row["pos"]] if isinstance(row["pos"], str) else row["pos"]
        if len(pos) != 1 or not isinstance(pos[0], str):
            raise ValueError(f"{path}: bitext needs one pos a row, not {str(pos):.80}")
        pair = f"{row['lang_q']}-{row.get('lang_p')}" if row.get("lang_q") else subset
        groups.setdefault(pair, []).append({"query": row["query"], "pos": pos[0]})
    return groups


def align(rows, path):
    """Pair the texts {id, lang, text} of equal id: each language with English, or with the first.

    Prints how many have no partner. Raises ValueError if an id comes twice in a language, or none
    in two.
    """
    texts = {(row["lang"], str(row["id"])): row["text"] for row in rows}
    languages = languages_in(rows)
    if len(texts) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(texts)} rows repeat the id and lang of another")
    pivot = "en" if "en" in languages else next(iter(languages), "")
    pairs = [{"query": text, "pos": texts[pivot, key], "lang_q": lang, "lang_p": pivot}
             for (lang, key), text in texts.items() if lang != pivot and (pivot, key) in texts]
    if not pairs:
        raise ValueError(f"{path}: no id occurs in {pivot!r} and in another language")
    if alone := sum(lang != pivot for lang, _ in texts) - len(pairs):
        print(f"{path}: {alone} texts have no partner in {pivot!r} and are left out")
    return pairs


# ---------------------------------------------------------------- what a run is scored on

def collections_in(folder):
    """Return the collections in a folder of data that are read once, at the end.

    Those named dev and clr_dev are for choosing, search for searching.
    """
    start = glob.escape(str(folder))               # glob.glob follows links to folders
    folders = {Path(path).parent for name in ("corpus.jsonl", "corpus.jsonl.gz")
               for path in glob.glob(f"{start}/**/{name}", recursive=True)}
    return sorted(path for path in folders if path.name not in ("dev", "clr_dev", "search")
                  and "held_out" not in path.relative_to(folder).parts)    # of tools/sets.py


def collections(cfg):
    """Return the folders that a stage is scored on: those named, else the test splits of DATA.

    Raises ValueError if the names of two, and so of their scores, are equal.
    """
    folders = [Path(name) for name in cfg.evaluate]
    if not folders and cfg.uses_folder:
        folders = collections_in(cfg.data)
    names = [(set_name(f), f.name if f.name in HELD_OUT else "") for f in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(map(str, folders))}: two folders to evaluate have one name, "
                         "and their scores would, too; rename one")
    return folders


def labelled_files(cfg):
    """Return {task: file} of the rows in a run's data that stages 3 and 4 are scored on."""
    if not cfg.uses_folder:
        return {}
    return {task: path for task, name in TEST_FILES.items()
            for path in (Path(cfg.data) / f"{name}.gz", Path(cfg.data) / name) if path.is_file()}


def unread(folder, kinds):
    """Return the JSONL files in a folder that nobody reads: their names may be misspelled.

    kinds: the kinds of training data, as in data.PARSERS.
    """
    scored = (VALIDATION_FILE, *TEST_FILES.values())

    def is_read(path):
        *above, name = path.relative_to(folder).parts
        if not above:
            kind = name.partition(".")[0].partition("-")[0]
            return kind in kinds or name.removesuffix(".gz") in scored
        is_collection = any(path.parent.glob("corpus.jsonl*"))
        return is_collection or above[0] == "held_out" or len(above) == 1 and above[0] in kinds

    return sorted(path for path in Path(folder).rglob("*")         # a .json is somebody's report
                  if is_json(path) and ".json" not in path.suffixes and not is_read(path))


def validation_rows(cfg, instruction=""):
    """Return DATA's held-out documents or pairs as examples of data.sft_batch, [] if it has none.

    Raises ValueError for a file without any.
    """
    folder = Path(cfg.data)
    file = {"pretrain": VALIDATION_FILE, "sft": "dev/corpus.jsonl"}.get(cfg.stage)
    if file is None or not cfg.uses_folder:
        return []
    path = next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None)
    if path is None:
        return []
    if cfg.stage == "pretrain":
        texts = islice(read_jsonl(path, {"text": str}), VALIDATION_TEXTS)
        rows = [(None, "", row["text"]) for row in texts]  # the first token follows a blank line
    else:
        dev = load_collection(folder / "dev")
        body = {row["id"]: document_text(row) for row in dev.corpus}
        best = {query: max(judged, key=judged.get) for query, judged in dev.qrels.items()
                if max(judged.values()) > 0}
        rows = [(instruction, query["text"], body[best[query["id"]]])
                for query in dev.queries if query["id"] in best][:VALIDATION_TEXTS]
    if not rows:
        raise ValueError(f"{path}: no text to measure the loss on")
    return rows


def read_ahead(configs):
    """Read all that some stages are scored on: a mistake shows before them, not at their end."""
    cfg = configs[-1]                              # stages share what they are scored on
    for folder in collections(cfg):
        collection, _ = scored_collection(folder)
        if not any(collection.qrels.get(row["id"]) for row in collection.queries):
            raise ValueError(f"{folder}: no query has a judged document")
    for task, path in labelled_files(cfg).items():
        read_groups(task, path)
        if task == "classification" and cfg.stage.startswith("embed") \
                and not importlib.util.find_spec("sklearn"):
            print(f"{path} is not scored: pip install scikit-learn first")
    for cfg in configs:
        validation_rows(cfg)
