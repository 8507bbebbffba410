"""Tokens from parallel sentences: the textbook corpus, EM against loops, and the aligned start."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

import align
import mixture
import train
from configurator import load_config
from engine import checkpoint
from tokenizer import Tokenizer

DAS, HAUS, BUCH, EIN, THE, HOUSE, BOOK, A = range(8)
WORDS = [f"w{a}{b}" for a in "klmno" for b in "aeiou"]
TEXTBOOK = [((DAS, HAUS), (THE, HOUSE)), ((DAS, BUCH), (THE, BOOK)), ((BUCH, EIN), (BOOK, A))]


def arrays(pairs):
    return [tuple(np.array(sorted(side)) for side in pair) for pair in pairs]


def test_the_textbook_corpus():
    a, b, forward, backward, count = align.model_1(arrays(TEXTBOOK), 8, rounds=30)
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
    a, b, f, g, _ = align.model_1(arrays(pairs), 18, rounds=4)
    assert len(a) == len(forward)
    for i, j, x, y in zip(a, b, f, g):
        assert (x, y) == (pytest.approx(forward[i, j]), pytest.approx(backward[j, i]))


def hidden_dictionary(first, second, n=300, words=40, seed=1):
    """Sentences in which token first + i translates to second + i."""
    rng = random.Random(seed)
    return arrays([([first + i for i in ids], [second + i for i in ids])
                   for ids in (rng.sample(range(words), 5) for _ in range(n))])


def test_the_matrix_finds_a_hidden_dictionary():
    bitext = {("de", "en"): hidden_dictionary(0, 40)}
    m = align.translation_matrix(bitext, 80, smallest=1).to_dense()
    assert torch.equal(m[:40].argmax(1), torch.arange(40, 80))
    assert m[:40].sum(1).tolist() == pytest.approx([1.0] * 40)
    assert not m[40:].any()                            # English is what the others are drawn to


def test_pairs_without_english_go_both_ways_and_few_sentences_count_for_nothing():
    bitext = {("de", "fr"): hidden_dictionary(0, 40), ("en", "it"): hidden_dictionary(0, 40, n=9)}
    m = align.translation_matrix(bitext, 80, smallest=10).to_dense()
    assert torch.equal(m.argmax(1), torch.cat([torch.arange(40, 80), torch.arange(40)]))
    assert not align.translation_matrix(bitext, 80, smallest=301).to_dense().any()


def test_mixing_by_hand_and_through_a_third_language():
    vectors = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    m = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).to_sparse()
    got = align.aligned(vectors, m, 4.0, rounds=1)
    assert got[0].tolist() == pytest.approx([3 / 5, 4 / 5])              # (3, 4) at length 1
    assert torch.equal(got[1:], vectors[1:])           # what has no translation stays
    torch.manual_seed(0)
    vectors = torch.randn(3, 64)                       # 0 -> 1 -> 2
    chain = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]]).to_sparse()
    once, twice = (align.aligned(vectors, chain, 10.0, rounds=n) for n in (1, 2))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(once[0], vectors[2], dim=0) < 0.3 < 0.9 < cosine(twice[0], vectors[2], dim=0)
    assert torch.allclose(twice.norm(dim=1).flip(0), vectors.norm(dim=1).flip(0).cummin(0).values)


def test_a_word_is_no_longer_than_its_translations():
    """A question word is rare where its language is rare; its length, the IDF, is not."""
    vectors = torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.5]))
    m = torch.tensor([[0, 0.75, 0.25, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]]).to_sparse()
    got = align.aligned(vectors, m, 2.0, rounds=1).norm(dim=1)
    assert got.tolist() == pytest.approx([0.75 * 1 + 0.25 * 2, 1, 2, 0.5])


# ---------------------------------------------------------------- as stage 1 uses it

@pytest.fixture
def run(tmp_path):
    """A run on 600 German-English sentence pairs by a hidden dictionary."""
    rng, rows = random.Random(0), []
    for _ in range(600):
        ids = rng.sample(range(25), 4)
        rows.append({"query": " ".join("x" + WORDS[i] for i in ids), "lang_q": "de", "prompt": "",
                     "pos": [" ".join("y" + WORDS[i] for i in ids)], "lang_p": "en"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["query"] for row in rows] + [row["pos"][0] for row in rows]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "out").mkdir()
    Tokenizer.train(texts, 400).save(tmp_path / "out" / "tokenizer.tiktoken")

    def arguments(**more):
        return [f"--{k}={v}" for k, v in {
            "stage": "pretrain", "pairs": pairs, "text": tmp_path / "text.jsonl", "vocab_size": 400,
            "out": tmp_path / "out", "n_embd": 64, "attention_dim": 0, "steps": 1, "batch_size": 2,
            "learning_rate": 0, "passage_len": 16, "query_len": 16, "device": "cpu",
            "dtype": "float32", "evaluate": "", **more}.items()]
    return arguments


def test_stage_1_starts_with_translations_close(run):
    cfg = load_config(train.TrainConfig, run(aligned_start=10))
    tokenizer = Tokenizer.load(f"{cfg.out}/tokenizer.tiktoken")
    starts = []
    for weight in (0, 10):                             # a rate of 0: the start is what is saved
        train.main(run(aligned_start=weight, resume="false"))
        saved = checkpoint.load(checkpoint.latest(cfg.run_dir), "model.pt")
        starts.append(saved["embed_tokens.weight"])
    plain, aligned = starts
    sides = [[tokenizer.encode(f"{x}{word}") for word in WORDS] for x in "xy"]
    whole = [(a[0], b[0]) for a, b in zip(*sides) if len(a) == len(b) == 1]
    assert len(whole) > 10                             # words that are one token on both sides
    left, right = map(list, zip(*whole))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(aligned[left], aligned[right]).min() > 0.8
    assert cosine(plain[left], plain[right]).max() < 0.6
    assert (aligned.norm(dim=1) <= plain.norm(dim=1) * 1.0001).all()


def test_rows_without_bitext_are_named(run, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"query": "a", "pos": ["b"]}) + "\n")
    cfg = load_config(train.TrainConfig, run(pairs=plain, aligned_start=1))
    with pytest.raises(ValueError, match="aligned_start needs bitext"):
        mixture.parallel_sentences(cfg, Tokenizer.load(f"{cfg.out}/tokenizer.tiktoken"))
