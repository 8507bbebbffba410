"""CLR: exact allotment, English no target of English, untouched passages, gates by hand."""
from collections import Counter

import pytest

from clr import (LANGUAGES, TABLE_7, Gates, allot, build_clr, copy_gate, length_gate, line_gate,
                 script_gate, script_share)

ROWS = [{"id": f"d{i}", "query": f"question {i}", "pos": [f"answer {i}"], "neg": ["x", "y"],
         "prompt": "Find it"} for i in range(300)]


def shout(text, lang):
    """A translator that is easy to check."""
    return f"{lang}: {text.upper()}"


# ---------------------------------------------------------------- allotment


def test_table_7_as_printed():
    assert list(TABLE_7) == list(LANGUAGES) and len(TABLE_7) == 26
    assert sum(TABLE_7.values()) == 106  # the paper's own sum, in percent
    assert [*TABLE_7.values()] == [25, 12, 8, 6, 6, 5, 5, 4, 4, 3, 3, *[2] * 10, *[1] * 5]


@pytest.mark.parametrize("n", [0, 1, 7, 25, 106, 1000, 21533])
def test_counts_are_the_largest_remainder(n):
    counts = Counter(allot(n, TABLE_7, seed=3))
    assert counts.total() == n
    for lang, share in TABLE_7.items():
        assert abs(counts[lang] - n * share / 106) < 1
    if n == 106:
        assert counts == Counter(TABLE_7)


def test_largest_remainder_by_hand():
    # 10 * (0.54, 0.17, 0.29): floors 5, 1, 2; the two that are left go to .9 and .7, not to .4
    assert Counter(allot(10, {"en": 54, "zh": 17, "es": 29})) == {"en": 5, "zh": 2, "es": 3}
    assert Counter(allot(3, {"en": 1, "zh": 1, "es": 0})) == {"en": 2, "zh": 1}


def test_order_depends_on_the_seed_alone():
    assert allot(500, seed=1) == allot(500, seed=1) != allot(500, seed=2)


@pytest.mark.parametrize("shares", [{}, {"en": 0}, {"en": 2, "zh": -1}])
def test_impossible_shares(shares):
    with pytest.raises(ValueError, match="shares"):
        allot(10, shares)


# ---------------------------------------------------------------- rows


def test_only_the_query_changes():
    rows = list(build_clr(ROWS, shout))
    assert len(rows) == len(ROWS)
    for old, new in zip(ROWS, rows):
        assert {k: new[k] for k in ("id", "pos", "neg", "prompt")} == {
            k: old[k] for k in ("id", "pos", "neg", "prompt")}
        assert (new["source_lang"], new["source_id"]) == ("en", old["id"])
        assert new["query"] == shout(old["query"], new["lang"])
    assert "lang" not in ROWS[0]                       # the input is left as it was


@pytest.mark.parametrize("source", ["en", "zh"])
def test_no_text_is_translated_into_its_own_language(source):
    """The other 25 languages share out the whole: of English rows 12 / 81 are Chinese."""
    n = 106 - TABLE_7[source]
    counts = Counter(row["lang"] for row in build_clr(ROWS[:n], shout, source_lang=source))
    assert counts == {lang: share for lang, share in TABLE_7.items() if lang != source}


def test_chinese_into_english_alone():
    rows = [{"query": f"问题 {i}", "pos": ["答案"]} for i in range(4)]
    translated = list(build_clr(rows, shout, {"en": 1}, source_lang="zh"))
    assert [(row["lang"], row["source_id"]) for row in translated] == [
        ("en", i) for i in range(4)]                   # rows without an id: their number
    with pytest.raises(ValueError, match="shares"):
        list(build_clr(rows, shout, {"zh": 1}, source_lang="zh"))


def test_dropped_rows_are_counted_by_reason():
    queries = ("alpha", "beta", "gamma", "delta", "none", " ")
    table = {"alpha": "альфа", "beta": "beta", "gamma": "г" * 60, "delta": "дδέλτα", " ": " "}
    gates = Gates(script_gate(0.5), length_gate(0.1, 4.0), copy_gate)
    rows = list(build_clr([{"query": q, "pos": ["p"]} for q in queries],
                          lambda text, lang: table.get(text), {"ru": 1}, gates=gates))
    assert [row["query"] for row in rows] == ["альфа"]
    assert gates.dropped == {"script": 2, "length": 1, "no translation": 2}  # beta: "script"


def test_a_language_of_no_known_script_passes_the_script_gate():
    gate = script_gate(0.5)
    assert gate("a", "жар", "uk") is None and gate("a", "heat", "ru") == "script"
    assert gate("a", "жxaр", "ru") is None                                  # just enough


def test_beirs_id_is_an_id():
    row, = build_clr([{"_id": "x7", "query": "alpha", "pos": ["p"]}], shout)
    assert row["source_id"] == "x7"


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("lang, text, share", [
    ("zh", "计算矩阵的行列式", 1), ("ja", "コピーする人々", 1), ("ko", "행렬의 역행렬", 1),
    ("ar", "مصفوفة", 1), ("he", "מטריצה", 1), ("hi", "सारणिक", 1), ("bn", "নির্ণায়ক", 1),
    ("th", "ดีเทอร์มิแนนต์", 1), ("km", "ម៉ាទ្រីស", 1), ("ru", "определитель", 1),
    ("vi", "định thức", 1), ("tr", "sıralı dizi", 1), ("pl", "łańcuch", 1),
    ("ru", "det матрицы", 7 / 10), ("zh", "numpy 数组", 2 / 7), ("de", "行列", 0), ("zh", "好", 1),
    ("en", "12 !", 0)])
def test_script_share(lang, text, share):
    assert script_share(text, lang) == pytest.approx(share)


def test_a_remark_behind_a_translation():
    assert [line_gate(source, "Liste sortieren\n\nNote: a query", "de")
            for source in ("Sort a list\n", "Sort\na\nlist")] == ["lines", None]


def test_length_and_copies():
    gate = length_gate(0.5, 2.0)
    assert [gate("abcd", text, "de") for text in ("a", "ab", "abcdefgh", "abcdefghi")] == [
        "length", None, None, "length"]
    assert gate("a", "abc", "de") == "length"
    assert [copy_gate("Sort the list", text, "de") for text in (
        "sort list!", "Liste sort", "the list")] == ["copy", None, "copy"]


def test_a_translator_that_loses_a_text_is_an_error():
    """Else each later row would get the translation of another."""
    class Loses:
        def many(self, jobs):
            return [shout(*job) for job in jobs][1:]
    with pytest.raises(ValueError, match="shorter"):
        list(build_clr(ROWS, Loses()))
