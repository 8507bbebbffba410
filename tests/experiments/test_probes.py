"""Probes by hand: encoders that see order, or do not, and ranks that are built in."""
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embed import Embedder
from engine.collection import Collection
from experiments import probes
from mask import CAUSAL, MaskSpec, effective_rank, soft_mask

BOOK = Collection([{"id": "a", "text": "The body of the function is here."}],
                  [{"id": "a", "text": "Convert a string to bytes."},
                   {"id": "b", "text": "Return nothing at all."}], {"a": {"a": 1}, "b": {"a": 1}})


class Words:
    """Embed a text by counts of its words, or of its pairs of neighbours."""
    prompts = {"retrieval": "Find"}

    def __init__(self, size=1):
        self.size = size

    def encode(self, texts, prompt=None, **_):
        out = np.zeros((len(texts), 4096), dtype=np.float32)
        for row, text in zip(out, texts):
            words = text.replace(".", "").split()
            for i in range(len(words) - self.size + 1):
                row[zlib.crc32(" ".join(words[i:i + self.size]).encode()) % 4096] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-9)


def test_order_sees_pairs_of_words_and_no_bag():
    triplets = probes.order_triplets(BOOK)
    assert [t[0] for t in triplets] == ["Convert a string to bytes.", "Convert a bytes to string."]
    assert triplets[0][1].startswith("Convert a string to bytes.\n\nThe body")
    assert triplets[0][1:] == triplets[1][:0:-1]
    assert probes.preference(Words(1), triplets) == 0.5            # ties count half
    assert probes.preference(Words(2), triplets) == 1.0


def test_numbers_are_seen_or_not():
    assert probes.number_gap(Words()) > 0.05
    blind = Words()
    blind.encode = lambda texts, **_: Words.encode(blind, [t.translate(
        str.maketrans("23456789", "n" * 8)) for t in texts])
    assert probes.number_gap(blind) == 0


def test_embeddings_on_one_line_have_rank_one():
    class Line:
        def encode(self, texts):
            return np.outer(np.arange(1, len(texts) + 1), [3, 4]).astype(np.float32)
    assert probes.embedding_rank(Line(), ["a", "b", "c"]) == pytest.approx(1)


@pytest.mark.parametrize("line, other", [
    ("Return points of curve.", "Return curve of points."),
    ("Read a file into an array.", "Read a array into an file."),
    ("Check for this from that.", None), ("Nothing.", None)])
def test_words_around_a_preposition_change_places(line, other):
    assert probes.swapped(line) == other


def test_a_late_sentence_needs_a_reader_of_the_whole():
    """An encoder of words that reads the first third only finds the first third alone."""
    rng = np.random.default_rng(0)
    corpus = [{"id": str(i), "text": " ".join(
        f"w{rng.integers(10 ** 6)} is followed by the word w{rng.integers(10 ** 6)}."
        for _ in range(60))} for i in range(8)]
    collection = Collection(corpus, [], {})
    encoder = Words()
    encoder.max_len = 10
    encoder.tokenizer = SimpleNamespace(encode=lambda text: text.split(" "), decode=" ".join)
    encoder.model = type("Model", (), {"config": type("Config", (), {"block_size": 300})})
    assert [probes.long_passages(encoder, collection, k) for k in (0, 2)] == [1, 1]
    whole, seen = encoder.encode, []

    def first_third(texts, **more):
        seen.append(encoder.max_len)
        return whole([text[:max(len(text) // 3, 100)] for text in texts], **more)

    encoder.encode = first_third
    first, last = (probes.long_passages(encoder, collection, k) for k in (0, 2))
    assert first == 1 > last and set(seen) == {300} and encoder.max_len == 10


def test_a_sentence_of_a_third_is_one_that_is_read():
    text = " ".join(f"This is the sentence that has the number {i}. Thing." for i in range(60))
    asked = []

    class Noted(Words):
        def encode(self, texts, prompt=None, **more):
            asked.extend(texts if prompt else ())
            return super().encode(texts, **more)
    encoder = Noted()
    encoder.max_len, encoder.tokenizer = 9, SimpleNamespace(encode=lambda text: text.split(" "),
                                                            decode=" ".join)
    encoder.model = SimpleNamespace(config=SimpleNamespace(block_size=271))     # 30 sentences
    for third in (0, 2):
        probes.long_passages(encoder, Collection([{"id": "d", "text": text}], [], {}), third)
    first, last = (int(query.split()[-1].rstrip(".")) for query in asked)
    assert 0 < first < 10 and 20 < last < 30


def test_parts_of_a_translated_question():
    corpus = [{"id": "d", "text": "x"}]
    texts = ("sort the frobnicated list", "sort a list", "zork")
    queries = [{"id": f"{i}/{lang}", "lang": lang, "text": text}
               for lang in ("en", "de") for i, text in enumerate(texts)]
    parts = probes.parts_of_questions(Collection(corpus, queries, {"0/de": {"d": 1}}))
    (whole,), (left,), (german,), (english,) = (part.queries for part in parts.values())
    assert whole == queries[3] and left["text"] == "frobnicated"       # others have one kind
    assert set(german["text"].split()) == {"sortieren", "Liste"}
    assert set(english["text"].split()) == {"sort", "list"}


def test_lm_loss_is_the_models_own(home):
    embedder = Embedder(home.out / "pretrain", dtype="float32")
    texts = ["sort the list of a graph", "read a file"]
    ids = embedder.tokenizer.encode_batch(texts)
    targets = torch.tensor([i for x in ids for i in [*x[1:], -100]])
    right = embedder.model(torch.tensor([i for x in ids for i in x]), [len(x) for x in ids],
                           CAUSAL, targets)
    assert probes.lm_loss(embedder, texts) == pytest.approx(right.item(), rel=1e-5)


def test_the_attention_has_the_rank_that_was_built_into_it(home):
    """Attention that ignores its logits is M with rows of sum 1: of full rank, and of rank 1."""
    embedder = Embedder(home.out / "sft", dtype="float32")
    for block in embedder.model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    texts = ["sort the list of a graph by its random vector, the file and the tree of time"] * 2
    for alpha in (0.0, 0.3, 1.0):
        rank, smooth, realised = probes.attention_ranks(embedder, texts, MaskSpec(alpha), n=8)
        m = soft_mask(8, alpha)
        assert realised == pytest.approx(effective_rank(m / m.sum(1, keepdim=True)), rel=1e-5)
        assert (rank, smooth) == (8 - math.floor(alpha * 8) if alpha < 1 else 1,
                                  pytest.approx(effective_rank(m)))
    later = [probes.attention_to_later(embedder, texts, MaskSpec(0.0, apply=apply), n=8)
             for apply in ("weights", "logits")]           # zero logits: uniform
    assert later == [0.0, pytest.approx(sum(range(8)) / 64)]


def test_the_attention_is_the_models(home):
    """With its values replaced by one-hot rows, a layer's attention gives the same matrix."""
    embedder = Embedder(home.out / "sft", dtype="float32")
    seen, operations = [], embedder.model.layers[0].self_attn.ops
    original = operations.attention

    def one_hot(q, k, v, texts):
        eye = torch.eye(8)[:, None].expand(8, k.shape[1], 8)
        seen.extend(original(q, k, eye.contiguous(), texts).transpose(0, 1))   # (H, T, T)
        return original(q, k, v, texts)

    operations.attention = one_hot
    ranks = probes.attention_ranks(embedder, ["sort the list of a graph by its vector"],
                                   MaskSpec(0.4), n=8)
    assert ranks[2] == pytest.approx(np.mean([effective_rank(p) for p in seen]), rel=1e-4)
