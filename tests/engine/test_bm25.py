"""BM25: a score worked by hand, equality with the plain double loop, ties, scripts, empty texts."""

import math
import random
import unicodedata

import pytest

from engine import bm25
from engine.bm25 import BM25, split_words


def naive_scores(documents, query, k1, b):
    """The formula as it is printed, one document and one word at a time."""
    split = [split_words(document) for document in documents]
    mean_length = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        score = 0.0
        for word in split_words(query):
            df = sum(word in other for other in split)
            tf = words.count(word)
            idf = math.log(1 + (len(split) - df + 0.5) / (df + 0.5))
            if tf:
                score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean_length))
        scores.append(score)
    return scores


def random_texts(seed, n, words=40, longest=12):
    draw = random.Random(seed)
    sizes = [draw.randint(0, longest) for _ in range(n)]
    return [
        " ".join(f"w{int(draw.paretovariate(0.6)) % words}" for _ in range(size)) for size in sizes
    ]


def test_a_score_worked_by_hand():
    # Two documents of 2 and 4 words (mean 3); "cat" is once in the first, twice in the second.
    index = BM25(["cat sat", "cat cat dog ran"])
    # idf(cat) = log(1 + 0.5 / 2.5) = log 1.2; damping = 1.2 * (0.25 + 0.75 * 2 / 3) = 0.9 and 1.5.
    expected = [math.log(1.2) * 1 / (1 + 0.9), math.log(1.2) * 2 / (2 + 1.5)]
    assert index.scores("Cat!") == pytest.approx(expected, rel=1e-6)
    # idf(dog) = log(1 + 1.5 / 1.5) = log 2: it is in the second document alone, once.
    assert index.scores("dog dog") == pytest.approx([0.0, 2 * math.log(2) / (1 + 1.5)], rel=1e-6)


@pytest.mark.parametrize("k1, b", [(1.2, 0.75), (0.9, 0.4), (0.0, 0.0), (2.0, 1.0)])
def test_equals_the_double_loop(monkeypatch, k1, b):
    documents, queries = random_texts(0, 60), random_texts(1, 20)
    monkeypatch.setattr(bm25, "K1", k1)
    monkeypatch.setattr(bm25, "B", b)
    index = BM25(documents)
    for query in queries:
        expected = naive_scores(documents, query, k1, b)
        assert index.scores(query) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_top_k_is_a_stable_sort_of_the_scores():
    documents, queries = random_texts(2, 80, words=6, longest=4), random_texts(3, 30, words=6)
    index = BM25(documents)
    for k in (1, 7, 80, 500):
        indices, scores = index.top_k(queries, k)
        assert indices.shape == scores.shape == (30, min(k, 80))
        for row, query in enumerate(queries):
            every = index.scores(query)
            expected = sorted(range(80), key=lambda i: (-every[i], i))[:k]
            assert indices[row].tolist() == expected
            assert scores[row].tolist() == every[expected].tolist()


def test_empty_query_document_and_collection():
    index = BM25(["", "a cat", "?!"])
    assert index.scores("").tolist() == index.scores("unknown").tolist() == [0, 0, 0]
    assert index.top_k(["cat"], 1)[0].tolist() == [[1]]
    assert BM25(["", ""]).top_k(["a"], 1)[0].tolist() == [[0]]
    assert BM25([]).top_k(["a"], 3)[0].shape == (1, 0)
    assert index.top_k([], 2)[0].shape == (0, 2)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Straße e\u0301te\u0301 İzmir", ["straße", "été", "i\u0307zmir"]),
        ("हिन्दी में লেখা", ["हिन्दी", "में", "লেখা"]),  # vowel signs stay inside their word
        ("np.linalg_norm(x, 2)", ["np", "linalg", "norm", "x", "2"]),
        ("서울특별시 역", ["서울", "울특", "특별", "별시", "역"]),
        ("GPUで学習", ["gpu", "で学", "学習"]),
        ("ไทย", ["ไท", "ทย"]),
        ("カナ・語。", ["カナ", "語"]), ("ខ្មែរ។", ["ខ្", "្ម", "មែ", "ែរ"]),
        ("__ ... \ufe0f", []),
        ("\U00011107\U00011127\U00011103 x", ["\U00011107\U00011127\U00011103", "x"]),  # Chakma
    ],
)
def test_words_of_many_scripts(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize("text", ["Café", "Tiếng Việt", "한국어 문서", "İzmir", "हिन्दी"])
def test_composed_and_decomposed_texts_are_the_same(text):
    """macOS writes file names and texts in NFD."""
    composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert split_words(apart) == split_words(composed) and split_words(text)
    found, score = BM25([composed, "other words"]).top_k([apart], 1)
    assert found.tolist() == [[0]] and score[0, 0] > 0
