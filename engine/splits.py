"""Names, splits and language groups of evaluation files; the scores themselves are in eval.py."""
from pathlib import Path

HELD_OUT = ("test", "dev", "validation")           # the split that is scored, the first one there
# A file or folder of such a name is called after the folder it is in: my_set/data.jsonl.gz.
PLAIN_NAMES = ("data", "rows", "pairs", "bitext", "sentences", "titles", "train", *HELD_OUT)


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


def check_name(key, name):
    """Raise ValueError if a result could not be called by this name: it stands between slashes."""
    if name is not None and (not isinstance(name, str) or "/" in name):
        raise ValueError(f"{key} {name!r} must be a string without '/'")


def choose_split(rows, split, path, with_train=False):
    """Return (the rows of a split, its name): `split`, or the first of HELD_OUT that is there.

    Rows that carry no split, or none of those, are all taken, as "all". `with_train` keeps the
    rows of "train" besides.
    """
    there = {row["split"] for row in rows if row.get("split")}
    chosen = split or next((name for name in HELD_OUT if name in there), None)
    if not there or chosen is None and not with_train:
        return rows, "all"
    wanted = {chosen or "test"} | ({"train"} if with_train else set())
    if not wanted <= there:
        raise ValueError(f"{path}: no rows of split {sorted(wanted - there)}, only {sorted(there)}")
    return [row for row in rows if row.get("split") in wanted], chosen


def groups_of(task, rows, subset, path):
    """Divide rows by language, if all have one: {language or pair of them or `subset`: rows}."""
    if task == "bitext":
        return bitext_groups(rows, subset, path)
    if task == "figure3" or not all(row.get("lang") for row in rows):
        return {subset: rows}
    return {lang: [row for row in rows if row["lang"] == lang] for lang in languages_in(rows)}


def bitext_groups(rows, subset, path):
    """Group {query, pos, lang_q, lang_p} by language pair, or build such pairs by equal id.

    In the other form, {id, lang, text}, each language is paired with English (without English:
    with the first language there is).
    """
    groups = {}
    if all("query" in row and len(row.get("pos") or ()) == 1 for row in rows):
        for row in rows:
            pair = f"{row['lang_q']}-{row['lang_p']}" if row.get("lang_q") else subset
            groups.setdefault(pair, []).append({"query": row["query"], "pos": row["pos"][0]})
        return groups
    if not all(row.keys() >= {"id", "lang", "text"} for row in rows):
        raise ValueError(f"{path}: bitext rows need query and one pos, or id, lang and text")
    texts = {(row["lang"], row["id"]): row["text"] for row in rows}
    if len(texts) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(texts)} rows repeat the id and lang of another")
    languages = languages_in(rows)
    pivot = "en" if "en" in languages else languages[0]
    for (lang, key), text in texts.items():
        if lang != pivot and (pivot, key) in texts:
            pair = {"query": text, "pos": texts[pivot, key]}
            groups.setdefault(f"{lang}-{pivot}", []).append(pair)
    if not groups:
        raise ValueError(f"{path}: no id occurs in {pivot!r} and in another language")
    return groups
