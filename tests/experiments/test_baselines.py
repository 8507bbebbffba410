"""Baselines: a bag by hand, IBM model 1 on the textbook corpus, and the table from a folder."""
import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch

from engine.jsonl import write_jsonl
from experiments import baselines

DAS, HAUS, BUCH, EIN, THE, HOUSE, BOOK, A = range(8)
TEXTBOOK = [((DAS, HAUS), (THE, HOUSE)), ((DAS, BUCH), (THE, BOOK)), ((BUCH, EIN), (BOOK, A))]


class Letters:
    """A tokenizer whose tokens are the letters a, b, c ..."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def arrays(pairs):
    return [tuple(np.array(sorted(side)) for side in pair) for pair in pairs]


# ---------------------------------------------------------------- the bag

def test_a_bag_is_the_mean_of_its_tokens():
    bag = baselines.BagOfVectors(Letters(), [[3, 0], [0, 4], [1, 1]])
    assert bag.encode(["ab", ""], prompt="Find").tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]


def test_idf_by_hand():
    """Of three texts "a" is in three, "b" in one: log(3 / 4), which is below 0, and log(3 / 2)."""
    weights = baselines.idf(Letters(), ["ab", "a", "aa"], 3)
    assert weights.tolist() == pytest.approx([0, np.log(1.5), np.log(3)])
    lengths = np.linalg.norm(baselines.random_table(weights, 4000), axis=1)
    assert lengths == pytest.approx(weights, rel=0.05)


# ---------------------------------------------------------------- IBM model 1

def test_the_textbook_corpus():
    a, b, forward, backward, count = baselines.model_1(arrays(TEXTBOOK), 8, rounds=30)
    t = {(int(i), int(j)): (f, g) for i, j, f, g in zip(a, b, forward, backward)}
    for pair in ((DAS, THE), (HAUS, HOUSE), (BUCH, BOOK), (EIN, A)):
        assert min(t[pair]) > 0.9, pair
    assert max(t[DAS, HOUSE]) < 0.1 and (HAUS, BOOK) not in t
    assert count.sum() == pytest.approx(6)             # every target token is shared out once


def by_hand(pairs, rounds):
    """IBM model 1 as nested loops: t(right | left)."""
    t = {pair: 1.0 for left, right in pairs for pair in itertools.product(left, right)}
    for _ in range(rounds):
        count, total = dict.fromkeys(t, 0.0), {}
        for left, right in pairs:
            for r in right:
                whole = sum(t[word, r] for word in left)
                for word in left:
                    share = t[word, r] / whole
                    count[word, r] += share
                    total[word] = total.get(word, 0) + share
        t = {(a, b): c / total[a] for (a, b), c in count.items()}
    return t


def test_counting_with_arrays_equals_the_loops():
    rng = random.Random(0)
    pairs = [(sorted(rng.sample(range(9), 5)), sorted(rng.sample(range(9, 18), 4)))
             for _ in range(30)]
    forward, backward = by_hand(pairs, 4), by_hand([(b, a) for a, b in pairs], 4)
    a, b, f, g, _ = baselines.model_1(arrays(pairs), 18, rounds=4)
    assert len(a) == len(forward)
    for i, j, x, y in zip(a, b, f, g):
        assert (x, y) == (pytest.approx(forward[i, j]), pytest.approx(backward[j, i]))


def hidden_dictionary(n=300, words=40, seed=1):
    """Sentences in which token i translates to token words + i."""
    rng = random.Random(seed)
    return arrays([(ids, [words + i for i in ids])
                   for ids in (rng.sample(range(words), 5) for _ in range(n))])


def test_the_matrix_finds_a_hidden_dictionary():
    m = baselines.translation_matrix({("de", "en"): hidden_dictionary()}, 80, smallest=1).to_dense()
    assert torch.equal(m[:40].argmax(1), torch.arange(40, 80))
    assert m[:40].sum(1).tolist() == pytest.approx([1.0] * 40)
    assert not m[40:].any()                            # English is what the others are drawn to


def test_pairs_without_english_count_both_ways_and_few_sentences_not_at_all():
    bitext = {("de", "fr"): hidden_dictionary(), ("en", "it"): hidden_dictionary(n=9)}
    m = baselines.translation_matrix(bitext, 80, smallest=10).to_dense()
    assert torch.equal(m.argmax(1), torch.cat([torch.arange(40, 80), torch.arange(40)]))
    assert not baselines.translation_matrix(bitext, 80, smallest=301).to_dense().any()


def test_mixing_by_hand_and_through_a_third_language():
    vectors = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    m = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).to_sparse()
    mixed = baselines.aligned(vectors, m, 4.0, rounds=1)
    assert mixed[0].tolist() == pytest.approx([3 / 5, 4 / 5])            # (3, 4) at length 1
    assert torch.equal(mixed[1:], vectors[1:])         # what has no translation stays
    vectors = torch.randn(3, 64)                       # 0 -> 1 -> 2
    chain = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]]).to_sparse()
    once, twice = (baselines.aligned(vectors, chain, 10.0, rounds=n) for n in (1, 2))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(once[0], vectors[2], dim=0) < 0.3 < 0.9 < cosine(twice[0], vectors[2], dim=0)


# ---------------------------------------------------------------- from a folder to the table

def test_every_baseline_is_scored_by_the_same_code(home, tmp_path):
    flags = [f"--data={home.data}", "--dim=256", "--vocab_size=500",
             f"--out={tmp_path / 'baselines.json'}"]
    table = json.loads(baselines.main(flags).read_text())
    rows = {row.pop(""): row for row in table["tables"][""]}
    test = rows["retrieval data test, ndcg@10"]
    assert list(test) == ["BM25", "IDF bag of random vectors"]
    assert all(0 < value < 1 for value in test.values())
    assert table["scores"]["BM25"]["retrieval/data/test/ndcg@10"] == test["BM25"]
    assert not any(" dev" in name or "clr_dev" in name for name in rows)


def test_the_headline_is_the_mean_of_the_foreign_directions():
    scores = {f"retrieval/x/{pair}/ndcg@10": value for pair, value in
              {"all": 0.9, "en-en": 0.8, "de-en": 0.4, "zh-en": 0.2, "de-zh": 0.7,
               "mean": 0.5}.items()}
    scores |= {"sts/sim/fi/spearman": 0.5, "retrieval/x/all/recall@1": 1.0}
    rows = baselines.headline(baselines.main_scores(scores))
    assert rows.pop(baselines.HEADLINE) == pytest.approx(0.3)
    assert list(rows) == ["retrieval x en-en, ndcg@10", "retrieval x zh-en, ndcg@10",
                          "retrieval x mean, ndcg@10", "sts sim fi, spearman"]


def test_several_checkpoints_are_one_column_with_its_interval():
    scores = {"nanoConan, a": {"sts/sim/en/spearman": 0.4}, "BM25": {},
              "nanoConan, b": {"sts/sim/en/spearman": 0.6}}
    row, = baselines.table_of(scores)
    assert list(row) == ["", "nanoConan", "± 95 %", "BM25"] and row["BM25"] is None
    # t of one degree of freedom, 12.706, times 0.1414 / sqrt(2)
    assert (row["nanoConan"], row["± 95 %"]) == pytest.approx((0.5, 1.2706), rel=1e-3)


def test_public_sets_are_scored_beside_a_trained_model(home, tmp_path):
    root, word = tmp_path / "root", ("a list", "read", "tree")
    shutil.copytree(home.data / "clr_test", root / "qa_dev")
    (root / "sim").mkdir()
    write_jsonl(root / "sim" / "data.jsonl", [
        {"sentence1": "sort", "sentence2": word[i], "score": i, "lang": "en", "split": split}
        for split in ("train", "dev") for i in range(3)])
    flags = [f"--root={root}", f"--data={home.data}", f"--checkpoint={home.out / 'embed_sup'}",
             "--vocab_size=500", "--dim=64", f"--out={tmp_path / 'real.json'}"]
    table = json.loads(baselines.main(flags).read_text())
    label = f"nanoConan, {home.out / 'embed_sup'}"
    assert list(table["scores"]) == [label, "BM25", "IDF bag of random vectors"]
    assert list(table["tables"][""][0]) == ["", "nanoConan", "BM25", "IDF bag of random vectors"]
    names = [row[""] for row in table["tables"][""]]
    assert names[0] == baselines.HEADLINE and "sts sim en, spearman" in names
    assert "retrieval qa_dev mean, ndcg@10" in names
    assert "retrieval/qa_dev/de-en/ndcg@10" in table["scores"]["BM25"]
    assert table["command"] == " ".join(["python -m experiments.baselines", *flags])
    with pytest.raises(ValueError, match="nowhere: no set to score"):
        baselines.main([*flags, "--root=nowhere", f"--data={tmp_path}"])


def test_bitext_brings_the_aligned_bag(tmp_path):
    """After alignment a word's nearest token is its translation."""
    rng, rows = random.Random(0), []
    words = [f"w{a}{b}" for a in "klmno" for b in "aeiou"]
    for _ in range(600):
        ids = rng.sample(range(25), 4)
        rows.append({"query": " ".join("x" + words[i] for i in ids), "lang_q": "de", "prompt": "",
                     "pos": [" ".join("y" + words[i] for i in ids)], "lang_p": "en"})
    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "bitext.jsonl", rows)
    write_jsonl(tmp_path / "text.jsonl", [{"text": row["query"]} for row in rows]
                + [{"text": row["pos"][0]} for row in rows])
    cfg = baselines.BaselinesConfig(data=str(tmp_path), vocab_size=400, dim=64, weight=10.0)
    by_label = dict(baselines.encoders(cfg))
    for label, low, high in (("IDF bag of random vectors", -1, 0.6),
                             ("the same, aligned by IBM model 1", 0.6, 1.01)):
        left, right = (by_label[label].encode([f"{side}{word}" for word in words]) for side in "xy")
        assert low <= np.median((left * right).sum(1)) < high


def test_only_rows_with_an_empty_prompt_are_translations(tmp_path):
    row = {"query": "das Haus", "pos": ["the house"], "lang_q": "de", "lang_p": "en"}
    rows = [row | {"prompt": ""}, row, row | {"prompt": None}, row | {"prompt": "Find"},
            row | {"prompt": "", "lang_q": "en"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = baselines.Tokenizer.train(["das Haus", "the house"] * 9, 260)
    (languages, pairs), = baselines.read_bitext([tmp_path / "rows.jsonl"], tokenizer).items()
    assert languages == ("de", "en") and len(pairs) == 1
