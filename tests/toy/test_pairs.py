"""Weak pairs: sentences, names and parameters by hand; what is held out is never one of them."""

import pytest

from toy.pairs import key_of, name_rows, parameter_rows, parameters_of, sentence_rows

FIRST = "The sort is stable, so that equal items keep their order."
SECOND = "It takes a time of n log n in the worst of all cases."
ROW = {"name": "lib.sort_all", "summary": "Sort all items.", "body": f"{FIRST}\n\n{SECOND}",
       "text": f"Sort all items.\n\n{FIRST}\n\n{SECOND}"}
NUMPY = """Do it.

Parameters
----------
x : int
    The first number, as it comes.
    A second line.
*args : int, optional
    More numbers.

Returns
-------
y : int
    The sum.
"""
GOOGLE = """Do it.

Args:
    input (Tensor): the input of any shape
    dim (int, optional): the dimension to sum over,
        the last one by default
    out: where to

Returns:
    sum (Tensor): the sum
"""


def test_a_sentence_asks_for_the_rest_of_its_document():
    rows = list(sentence_rows([ROW], set()))
    assert {row["query"] for row in rows} == {FIRST, SECOND}
    for row in rows:
        assert row["query"] not in row["pos"][0] and row["name"] == ROW["name"]
        assert row["pos"][0].startswith("Sort all items.")


def test_a_held_out_sentence_is_no_query():
    assert [row["query"] for row in sentence_rows([ROW], {key_of(FIRST.upper())})] == [SECOND]


def test_the_summary_is_no_query():
    row = ROW | {"summary": FIRST}
    assert [row["query"] for row in sentence_rows([row], set())] == [SECOND]


def test_a_name_asks_for_summary_and_body():
    passage = f"{ROW['summary']}\n{ROW['body']}"
    assert list(name_rows([ROW], set())) == [
        {"query": "lib sort all", "pos": [passage], "name": "lib.sort_all"}]
    assert list(name_rows([ROW], {key_of(passage)})) == []
    assert list(name_rows([ROW | {"name": "sort"}], set())) == []


@pytest.mark.parametrize("text, expected", [
    (NUMPY, [("x", "The first number, as it comes. A second line."),
             ("args", "More numbers.")]),
    (GOOGLE, [("input", "the input of any shape"),
              ("dim", "the dimension to sum over, the last one by default"), ("out", "where to")]),
    ("Parameters of the model are kept.", []), ("", [])])
def test_parameters(text, expected):
    assert parameters_of(text) == expected


def test_a_description_comes_once():
    rows = [ROW | {"text": NUMPY, "name": name} for name in ("a.f", "b.f")]
    found = list(parameter_rows(rows, set()))
    assert found == [{"query": "x: Sort all items.", "name": "a.f",
                      "pos": ["The first number, as it comes. A second line."]}]
    assert list(parameter_rows(rows, {key_of(found[0]["pos"][0])})) == []


def test_a_held_out_text_is_no_passage_and_two_sentences_are_queries_at_most():
    rest = key_of(f"Sort all items. {SECOND}")             # of the first sentence
    assert [row["query"] for row in sentence_rows([ROW], {rest})] == [SECOND]
    third = "Nothing else is kept in memory while it is at work on them."
    assert len(list(sentence_rows([ROW | {"text": f"{ROW['text']}\n\n{third}"}], set()))) == 2
