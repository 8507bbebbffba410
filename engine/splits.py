"""Rows of evaluation files by split and language, and the set's name; eval.py scores them."""
from pathlib import Path

from engine.jsonl import read_jsonl

HELD_OUT = ("test", "dev", "validation")           # the split that is scored, the first one there
# A file or folder of such a name is called after the folder it is in: my_set/data.jsonl.gz.
PLAIN_NAMES = ("data", "rows", "pairs", "bitext", "sentences", "titles", "train", *HELD_OUT)
SENTENCES = {"sentence1": str, "sentence2": str}
COLUMNS = {                        # what a task's rows must have
    "bitext": {"query": str, "pos": (str, list)},
    "aligned": {"id": (str, int), "lang": str, "text": str},       # the other form of bitext
    "sts": {**SENTENCES, "score": (int, float)},
    "pair_classification": {**SENTENCES, "label": int},
    "classification": {"text": str, "label": (str, int), "split": str},
}


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

    Rows that carry no split, or none of those, are all taken, as "all". `with_train` keeps the
    rows of "train" besides. Raises ValueError if a split is not there.
    """
    there = {row["split"] for row in rows if row.get("split")}
    chosen = split or next((name for name in HELD_OUT if name in there), None)
    if not there or chosen is None and not with_train:
        return rows, "all"
    wanted = {chosen or "test"} | ({"train"} if with_train else set())
    if not wanted <= there:
        raise ValueError(f"{path}: no rows of split {sorted(wanted - there)}, only {sorted(there)}")
    return [row for row in rows if row.get("split") in wanted], chosen


def read_groups(task, path, split=None):
    """Return {language or pair of them: rows} of a file; {split: rows} if some rows have none.

    Raises ValueError for a bad row, by file and line, and for a split that is not there.
    """
    aligned = task == "bitext" and "query" not in next(iter(read_jsonl(path)), ())
    rows = list(read_jsonl(path, COLUMNS["aligned" if aligned else task]))
    if not rows:
        raise ValueError(f"{path}: no rows")
    rows, subset = choose_split(rows, split, path, task == "classification")
    if task == "bitext":
        return pair_groups(align(rows, path) if aligned else rows, subset, path)
    if not all(row.get("lang") for row in rows):
        return {subset: rows}
    return {lang: [row for row in rows if row["lang"] == lang] for lang in languages_in(rows)}


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

    Raises ValueError if an id comes twice in a language, or in one language alone.
    """
    texts, languages = {(row["lang"], row["id"]): row["text"] for row in rows}, languages_in(rows)
    if len(texts) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(texts)} rows repeat the id and lang of another")
    pivot = "en" if "en" in languages else languages[0]
    pairs = [{"query": text, "pos": texts[pivot, key], "lang_q": lang, "lang_p": pivot}
             for (lang, key), text in texts.items() if lang != pivot and (pivot, key) in texts]
    if not pairs:
        raise ValueError(f"{path}: no id occurs in {pivot!r} and in another language")
    return pairs
