"""Metrics and tasks by hand and against plain loops; files, splits, languages, the command line."""
import dataclasses
import gzip
import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from data import PROMPTS
from engine import collection
from engine.collection import Collection, document_text, load_collection
from engine.distributed import ALONE
from eval import (CachedEncoder, LexicalBaseline, average_precision, evaluate, hit_at_k,
                  mean_average_precision, mrr_at_k, ndcg_at_k, recall_at_k, spearman)
from mask import CAUSAL
from ranks import tiny_model, write_lines
from train import TrainConfig


class Vectors:
    """An encoder that looks its vectors up (or draws one per text) and notes what it was asked."""

    def __init__(self, known=None, width=8):
        self.known, self.width, self.asked, self.prompts = known or {}, width, [], PROMPTS

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True):
        self.asked += [(prompt, text) for text in texts]
        rows = [self.known.get(text, self._draw(text)) for text in texts]
        vectors = np.array(rows, dtype=np.float32)[:, :truncate_dim]
        if normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _draw(self, text):
        return np.random.default_rng(list(text.encode())).normal(size=self.width)


def angle(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def random_gains(seed, queries=30, ranks=12):
    draw = np.random.default_rng(seed)
    gains = draw.integers(0, 4, (queries, ranks)) * (draw.random((queries, ranks)) < 0.3)
    judged = [[g for g in row if g] + [1] * int(draw.integers(0, 3)) for row in gains.tolist()]
    return gains, judged


# ---------------------------------------------------------------- metrics


def test_ndcg_of_graded_relevance_by_hand():
    found = 1 / math.log2(2) + 3 / math.log2(4)  # gains 1, 0, 3 at ranks 1, 2, 3
    best = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)  # a gain of 2 was not found
    assert ndcg_at_k([1, 0, 3], 3, judged=[1, 2, 3]) == pytest.approx(found / best)
    best_two = 3 / math.log2(2) + 2 / math.log2(3)
    assert ndcg_at_k([1, 0, 3], 2, judged=[1, 2, 3]) == pytest.approx(1 / best_two)


@pytest.mark.parametrize("k", [1, 3, 10, 12, 50])
def test_ranking_metrics_equal_plain_loops(k):
    gains, judged = random_gains(k)
    recall, hit, mrr, ap = [], [], [], []
    cut = gains[:, :k]
    for row, relevant in zip(cut.tolist(), judged):
        positions = [rank for rank, gain in enumerate(row, 1) if gain]
        recall.append(len(positions) / len(relevant) if relevant else 0)
        hit.append(bool(positions))
        mrr.append(1 / positions[0] if positions else 0)
        precisions = [(i + 1) / rank for i, rank in enumerate(positions)]
        ap.append(sum(precisions) / len(relevant) if relevant else 0)
    assert recall_at_k(gains, k, judged) == pytest.approx(np.mean(recall))
    assert hit_at_k(gains, k) == pytest.approx(np.mean(hit))
    assert mrr_at_k(gains, k) == pytest.approx(np.mean(mrr))
    assert mean_average_precision(cut, judged) == pytest.approx(np.mean(ap))


def test_ranking_metrics_of_nothing():
    for metric in (ndcg_at_k, recall_at_k, hit_at_k, mrr_at_k, mean_average_precision):
        assert metric([]) == metric([[]]) == metric([0, 0, 0]) == 0.0
        assert metric([[1], [0, 0]]) == 0.5  # lists of different lengths
    with pytest.raises(ValueError, match="2 queries, judged has 1"):
        recall_at_k([[1], [0]], 1, judged=[[1]])


def test_average_precision_of_ties():
    assert average_precision([1, 0], [0.3, 0.3]) == 0.5
    # At 0.9: 1 of 1. The two at 0.5 are one step: 2 of 3.
    assert average_precision([1, 0, 1], [0.9, 0.5, 0.5]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 2, 50), draw.integers(0, 8, 50)
    order = draw.permutation(50)
    expected = pytest.approx(average_precision(labels, scores))
    assert average_precision(labels[order], scores[order]) == expected
    assert average_precision([], []) == average_precision([0, 0], [1, 2]) == 0.0


def test_spearman_by_hand():
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    x = np.random.default_rng(0).normal(size=40)
    assert spearman(x, np.exp(x)) == spearman([1, 2], [3, 4]) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    assert spearman(x, np.ones(40)) == spearman([], []) == spearman([1], [2]) == 0.0


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        spearman([1, float("nan"), 3], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        average_precision([1, 0], [float("inf"), 0])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        spearman([1, 2, 3], [1, 2])


def test_a_negative_relevance_gains_nothing():
    assert ndcg_at_k([-1, 1], judged=[-1, 1]) == pytest.approx(1 / math.log2(3))
    assert [f([-1, 1], 1) for f in (recall_at_k, hit_at_k, mrr_at_k)] == [0, 0, 0]
    assert mean_average_precision([-1, 1]) == 0.5


# ---------------------------------------------------------------- encoding and search


def test_cached_encoder_encodes_once_and_serves_prefixes():
    inner = Vectors()
    encoder = CachedEncoder(inner)
    full = encoder.encode(["a", "b", "a"])
    short = encoder.first(3).encode(["b", "c"])
    encoder.encode(["a"], prompt="P")
    assert inner.asked == [(None, "a"), (None, "b"), (None, "c"), ("P", "a")]
    assert (full[0] == full[2]).all()
    cut = full[1, :3] / np.linalg.norm(full[1, :3])
    assert short[0] == pytest.approx(cut) and short.shape == (2, 3)
    with pytest.raises(ValueError, match=r"1..8, got 9"):
        encoder.first(9).encode(["a"])
    encoder = CachedEncoder(Vectors({"broken": [np.nan, 1.0], "fine": [1.0, 0.0]}))
    with pytest.raises(ValueError, match="'broken' is not finite"):
        encoder.encode(["fine", "broken"])


def test_search_in_chunks_is_a_stable_sort(monkeypatch):
    draw = np.random.default_rng(0)  # halves: their dot products are exact, and often tie
    names = [f"q{i}" for i in range(7)] + [f"d{i}" for i in range(30)]
    encoder = Vectors({name: draw.choice([-0.5, 0.5], 4) for name in names})
    cosine = encoder.encode(names[:7]) @ encoder.encode(names[7:]).T
    expected = np.argsort(-cosine, axis=1, kind="stable")
    for pairs_at_once in (1, 70, 10**6):
        monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", pairs_at_once)
        for k in (1, 5, 30, 99):
            found = evaluation.rank_documents(encoder, names[:7], names[7:], k, "retrieval")
            assert found.tolist() == expected[:, :k].tolist()


def test_bm25_finds_only_what_shares_a_word():
    found = evaluation.rank_documents(
        LexicalBaseline(), ["cat", "bird"], ["a dog", "a cat"], 2, "retrieval")
    assert found.tolist() == [[1, -1], [-1, -1]]
    with pytest.raises(ValueError, match="BM25 has no vectors"):
        evaluation.sts(LexicalBaseline(), [{"sentence1": "a", "sentence2": "a", "score": 1}])


def test_a_prefix_of_zeros_stays_zero():
    short = CachedEncoder(Vectors({"a": [0.0, 0.0, 1.0]})).first(2)
    assert short.encode(["a"]).tolist() == [[0, 0]]


# ---------------------------------------------------------------- tasks

COLLECTION = Collection(
    corpus=[
        {"id": "d0", "title": "T", "text": "zero", "lang": "en"},
        {"id": "d1", "title": "", "text": "one", "lang": "en"},
        {"id": "d2", "text": "deux", "lang": "fr"},
    ],
    queries=[
        {"id": "q0", "text": "first", "lang": "en"},
        {"id": "q1", "text": "second", "lang": "fr"},
        {"id": "q2", "text": "unjudged", "lang": "en"},
    ],
    qrels={"q0": {"d0": 1.0, "d1": 0.0}, "q1": {"d1": 1.0, "d2": 1.0}, "q2": {"d0": 0.0}},
)
PLANE = Vectors(
    {
        "first": angle(0), "second": angle(80), "unjudged": angle(0),
        "T zero": angle(30), "one": angle(10), "deux": angle(85),
    }
)


def test_retrieval_by_hand():
    # first: one, T zero, deux -> its d0 at rank 2. second: deux, T zero, one -> ranks 1 and 3.
    # The third query is judged, with a zero: it counts 0.
    scores = evaluation.retrieval(PLANE, COLLECTION)
    second = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert scores["ndcg@10"] == pytest.approx((1 / math.log2(3) + second) / 3)
    assert scores["recall@1"] == pytest.approx((0 + 1 / 2) / 3)
    assert scores["hit@1"] == pytest.approx(1 / 3)
    assert scores["recall@10"] == scores["recall@20"] == scores["recall@100"] == 2 / 3
    assert scores["map"] == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 3)
    assert scores["mrr@10"] == pytest.approx((1 / 2 + 1) / 3)


def test_of_equal_scores_the_larger_id_goes_first():
    """trec_eval's order; a corpus file's order must not decide."""
    collection = Collection([{"id": i, "text": "same"} for i in ("a", "c", "b")],
                            [{"id": "q", "text": "query"}], {"q": {"b": 1.0}})
    encoder = Vectors()
    assert evaluation.retrieval(encoder, collection)["mrr@10"] == 1 / 2
    assert encoder.asked.count((None, "same")) == 1        # rounding must not tell them apart


def test_a_querys_own_document_is_left_out_on_request():
    corpus = [{"id": "q0", "text": "first"}, {"id": "d1", "text": "one"}]
    collection = Collection(corpus, [{"id": "q0", "text": "first"}], {"q0": {"d1": 1.0}})
    assert evaluation.retrieval(PLANE, collection)["mrr@10"] == 1 / 2
    collection = dataclasses.replace(collection, without_self={"q0"})
    assert evaluation.retrieval(PLANE, collection)["mrr@10"] == 1


def test_retrieval_prompts_queries_and_not_documents():
    encoder = Vectors()
    evaluation.retrieval(encoder, COLLECTION)
    assert [text for prompt, text in encoder.asked if prompt] == ["first", "second", "unjudged"]
    assert {prompt for prompt, _ in encoder.asked} == {PROMPTS["retrieval"], None}
    encoder.asked, encoder.prompts = [], {"retrieval": "Represent this question"}
    evaluation.retrieval(encoder, COLLECTION)
    assert {prompt for prompt, _ in encoder.asked} == {"Represent this question", None}


def test_retrieval_without_judged_documents_is_an_error():
    with pytest.raises(ValueError, match="no query"):
        evaluation.retrieval(PLANE, dataclasses.replace(COLLECTION, qrels={}))


def test_language_matrix_restricts_candidates_and_answers():
    results = evaluation.retrieval_by_language(PLANE, COLLECTION, "test")
    assert results["test"] == evaluation.retrieval(PLANE, COLLECTION)
    assert results.keys() == {"test", "en-en", "fr-en", "fr-fr", "mean"}
    assert results["en-en"]["mrr@10"] == 1 / 2 / 2         # one of its two queries has zeros only
    assert results["fr-en"]["mrr@10"] == 1 / 2  # T zero before one; deux does not compete
    assert results["fr-fr"]["mrr@10"] == 1
    assert results["mean"]["mrr@10"] == pytest.approx((1 / 4 + 1 / 2 + 1) / 3)


def test_english_queries_are_scored_against_passages_of_other_languages():
    """Also where their English answer is judged with zero there."""
    qrels = {"q0": {"d2": 1.0}, "q2": {"d0": 1.0, "d2": 0.0}}
    results = evaluation.retrieval_by_language(PLANE, dataclasses.replace(COLLECTION, qrels=qrels))
    assert results["en-fr"]["mrr@10"] == 1 and results["en-en"]["mrr@10"] == 1 / 2


def test_a_pair_of_languages_without_a_relevant_document_is_not_scored():
    collection = dataclasses.replace(COLLECTION, qrels={"q0": {"d0": 1.0}, "q2": {"d2": 0.0}})
    assert evaluation.retrieval_by_language(PLANE, collection).keys() == {"all"}    # en-en, no mean
    with pytest.raises(ValueError, match="queries in other languages"):
        evaluation.mkqa(PLANE, dataclasses.replace(COLLECTION, qrels={"q1": {"d0": 0.0}}))


def test_mkqa_means_over_the_languages_besides_english():
    results = evaluation.mkqa(PLANE, COLLECTION)
    assert results.keys() == {"en", "fr", "mean"}
    assert results["mean"] == results["fr"] == {
        "recall@20": 1.0, "recall@100": 1.0, "ndcg@10": pytest.approx(1 / math.log2(3)),
    }
    english = [row for row in COLLECTION.queries if row["lang"] == "en"]
    with pytest.raises(ValueError, match="mkqa needs `lang`"):
        evaluation.mkqa(PLANE, dataclasses.replace(COLLECTION, queries=english))


def test_mkqa_looks_for_the_answers_words(tmp_path):
    """Nobody judged: no qrels, passages without lang. "Ni" is no answer inside of "night"."""
    corpus = [{"id": "d0", "title": "", "text": "A night in May."},
              {"id": "d1", "title": "Knights", "text": "who say NI!"},
              {"id": "d2", "text": "It was in May 1976, in Ni\u0301mes."}]
    queries = [{"id": "q0", "text": "a", "lang": "de", "answers": ["Ni"]},
               {"id": "q1", "text": "b", "lang": "de", "answers": ["may 1976", "June"]},
               {"id": "q2", "text": "c", "lang": "de", "answers": ["N\u00edmes", "1975"]},
               {"id": "q3", "text": "d", "lang": "de", "answers": []},
               {"id": "q4", "text": "e", "lang": "en", "answers": ["1975"]}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        write_lines(tmp_path / "mkqa" / f"{name}.jsonl", rows)
    known = dict(zip("abcde", map(angle, (0, 0, 90, 0, 0))))
    known |= {document_text(row): angle(i * 20) for i, row in enumerate(corpus)}
    results = evaluate(Vectors(known), "mkqa", tmp_path / "mkqa")
    # Ranks of the answers: d1 second, d2 third, d2 first.
    ndcg = (1 / math.log2(3) + 1 / math.log2(4) + 1) / 3
    assert results["mkqa/mkqa/mean/ndcg@10"] == pytest.approx(ndcg)
    assert results["mkqa/mkqa/de/recall@20"] == 1 and results["mkqa/mkqa/en/recall@20"] == 0
    # BM25 finds nothing for "a" and "c", although the last passage has an answer to "c"
    assert evaluate(LexicalBaseline(), "mkqa", tmp_path / "mkqa")["mkqa/mkqa/de/recall@20"] == 0
    with pytest.raises(ValueError, match="no query of the collection has a judged"):
        evaluate(Vectors(known), "retrieval", tmp_path / "mkqa")
    write_lines(tmp_path / "mkqa" / "corpus.jsonl", [{**row, "lang": "de"} for row in corpus])
    with pytest.raises(ValueError, match="mkqa needs `lang` in both files, English passages"):
        evaluate(Vectors(known), "mkqa", tmp_path / "mkqa")


def test_bitext_mining_has_two_directions():
    encoder = Vectors({"a": angle(0), "b": angle(50), "A": angle(10), "B": angle(20)})
    rows = [{"query": "a", "pos": "A"}, {"query": "b", "pos": "B"}]
    # a -> A, b -> B; back: A -> a, B -> a (20 degrees against 30).
    assert evaluation.bitext_mining(encoder, rows) == {"accuracy": 1.0, "accuracy_reverse": 0.5}


def test_sts_and_its_dimensions():
    known = {f"s{i}": [1.0, 0.0, 0.0] for i in range(3)}
    known |= {"t0": [1.0, 0.1, 9.0], "t1": [1.0, 0.5, 0.0], "t2": [1.0, 0.9, 0.0]}
    rows = [{"sentence1": f"s{i}", "sentence2": f"t{i}", "score": 3 - i} for i in range(3)]
    assert evaluation.sts(Vectors(known), rows)["spearman"] == pytest.approx(-0.5)
    short = CachedEncoder(Vectors(known)).first(2)
    assert evaluation.sts(short, rows)["spearman"] == pytest.approx(1)


def test_pair_classification_ranks_by_cosine():
    known = {"s": angle(0), "t": angle(40), "u": angle(0), "v": angle(36)}
    rows = [{"sentence1": "s", "sentence2": "t", "label": 1},
            {"sentence1": "u", "sentence2": "v", "label": 0}]
    assert evaluation.pair_classification(Vectors(known), rows) == {"ap": 0.5}


def labelled(n, labels=("x", "y", "z"), split=None):
    """n texts per label around one direction each, and the encoder that says so."""
    draw, known, rows = np.random.default_rng(0), {}, []
    for i, label in enumerate(labels):
        for j in range(n):
            text = f"{label}{j}{split or ''}"
            known[text] = np.eye(8)[i] * 4 + draw.normal(size=8)
            rows.append({"text": text, "label": label} | ({"split": split} if split else {}))
    return known, rows


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        evaluation.classification(Vectors(), labelled(2)[1])


def test_bitext_asks_for_the_prompt_of_a_symmetric_task():
    encoder, asked = Vectors(), []
    encoder.prompt_of = lambda kind, side=None: asked.append((kind, side))
    evaluation.bitext_mining(encoder, [{"query": "a", "pos": "b"}])
    assert set(asked) == {("bitext", None)}


def test_an_answer_beyond_rank_20_counts_at_100(tmp_path):
    write_lines(tmp_path / "mkqa/corpus.jsonl",
                [{"id": f"d{i}", "text": f"text {i}"} for i in range(90)])
    write_lines(tmp_path / "mkqa/queries.jsonl",
                [{"id": "q", "text": "a", "lang": "de", "answers": ["text 84"]}])
    known = {"a": angle(0)} | {f"text {i}": angle(i) for i in range(90)}
    scores = evaluate(Vectors(known), "mkqa", tmp_path / "mkqa")
    assert [scores[f"mkqa/mkqa/de/{name}"] for name in ("recall@20", "recall@100", "ndcg@10")] \
        == [0, 1, 0]


@pytest.mark.parametrize("stage, asked", [
    ("sft", [("retrieval", ())]), ("embed_weak", [("retrieval", ()), ("sts", ())]),
    ("embed_sup", [("retrieval", (4,)), ("sts", ())])])
def test_what_a_stage_is_scored_on(tmp_path, monkeypatch, stage, asked):
    write_lines(tmp_path / "test/corpus.jsonl", [{"id": "d", "text": "a"}])
    write_lines(tmp_path / "sts_test.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    seen, cfg = [], TrainConfig(stage=stage, data=str(tmp_path), dims=(4,))
    monkeypatch.setattr(evaluation, "evaluate", lambda encoder, name, path, dims=():
                        seen.append((name, dims)) or {})
    evaluation.evaluate_stage(SimpleNamespace(
        cfg=cfg, counters={}, whole_embedder=lambda: SimpleNamespace(prompts={}), world=ALONE))
    assert seen == asked


def validated(model, tokenizer, **settings):
    return SimpleNamespace(cfg=TrainConfig(**settings), wrapped=model, tokenizer=tokenizer,
                           prompts={"retrieval": "Find"}, world=ALONE, dtype="float32")


def causal_loss(state, examples):
    batch = data.sft_batch(examples, range(len(examples)), state.tokenizer, state.cfg.passage_len)
    loss = state.wrapped(batch.ids, batch.lengths, CAUSAL, batch.targets)
    return pytest.approx(float(loss.detach()), rel=1e-6)


def test_validation_is_on_the_first_texts(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(collection, "VALIDATION_TEXTS", 1)
    texts = ["the quick", "brown fox jumps"]
    write_lines(tmp_path / "text_dev.jsonl", [{"text": text} for text in texts])
    write_lines(tmp_path / "dev/corpus.jsonl", [{"id": text, "text": text} for text in texts])
    write_lines(tmp_path / "dev/queries.jsonl", [{"id": text, "text": "over"} for text in texts])
    (tmp_path / "dev/qrels.tsv").write_text("".join(f"{text}\t{text}\t1\n" for text in texts))
    model = tiny_model(std=0.3, vocab_size=tokenizer.vocab_size)
    for stage, example in (("pretrain", (None, "", texts[0])), ("sft", ("Find", "over", texts[0]))):
        state = validated(model, tokenizer, stage=stage, data=str(tmp_path))
        assert evaluation.validation_loss(state) == causal_loss(state, [example]), stage
        state.dtype = "bfloat16"
        assert evaluation.validation_loss(state) != causal_loss(state, [example]), stage


# ---------------------------------------------------------------- files, splits, the command line

def write_collection(folder, collection):
    write_lines(folder / "corpus.jsonl", collection.corpus)
    write_lines(folder / "queries.jsonl", collection.queries)
    with open(folder / "qrels.tsv", "w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query, gains in collection.qrels.items():
            file.writelines(f"{query}\t{doc}\t{int(gain)}\n" for doc, gain in gains.items())
    return folder


def test_collection_keys_and_dims(tmp_path):
    folder = write_collection(tmp_path / "my_docs" / "test", COLLECTION)
    results = evaluate(PLANE, "retrieval", folder, dims=(1,))
    whole = evaluation.retrieval(PLANE, COLLECTION)
    assert results["retrieval/my_docs/test/ndcg@10"] == whole["ndcg@10"]
    one = evaluation.retrieval(CachedEncoder(PLANE).first(1), COLLECTION)
    assert results["retrieval/my_docs/test/mrr@10:1"] == one["mrr@10"]
    assert all(isinstance(value, float) for value in results.values())
    assert {key.split("/")[2] for key in results} >= {"en-en", "fr-en", "mean"}


def write_beir(folder, splits, header="query-id\tcorpus-id\tscore\n"):
    """Write COLLECTION as BEIR publishes it, with q0 in one split and q1 in the other."""
    rows = {"corpus": COLLECTION.corpus, "queries": COLLECTION.queries}
    for name, part in rows.items():
        part = [{"_id": row["id"], **{k: v for k, v in row.items() if k != "id"}} for row in part]
        write_lines(folder / f"{name}.jsonl", part)
    (folder / "qrels").mkdir()
    for split, query in zip(splits, ("q0", "q1")):
        lines = [f"{query}\t{doc}\t{int(gain)}\n" for doc, gain in COLLECTION.qrels[query].items()]
        (folder / "qrels" / f"{split}.tsv").write_text(header + "".join(lines))
    return folder


@pytest.mark.parametrize("header", ["query-id\tcorpus-id\tscore\n", ""])
def test_beirs_own_layout(tmp_path, header):
    folder = write_beir(tmp_path / "scifact", ("test", "train"), header)
    (folder / "qrels" / "test.tsv.bak").write_text("not ours")
    results = evaluate(PLANE, "retrieval", folder)
    assert results["retrieval/scifact/test/mrr@10"] == 1 / 2
    assert evaluate(PLANE, "retrieval", folder, "train")["retrieval/scifact/train/mrr@10"] == 1
    with pytest.raises(FileNotFoundError, match=r"nor qrels/dev.tsv; .* \['test', 'train'\]"):
        evaluate(PLANE, "retrieval", folder, "dev")


def test_blank_lines_at_the_end_of_a_collections_files(tmp_path):
    folder = write_collection(tmp_path / "x", COLLECTION)
    before = load_collection(folder)
    for path in folder.iterdir():
        path.write_text(path.read_text() + "\n\n")
    assert load_collection(folder) == before
    (folder / "qrels.tsv").write_text("q0\td0\t1\n\nq1\td1\t1\n")
    with pytest.raises(ValueError, match="qrels.tsv:2: query-id, corpus-id and a number"):
        load_collection(folder)


def test_a_slash_in_a_language_stays_out_of_the_key(tmp_path):
    """It would be five parts of a key: "retrieval/set/zh/tw-en/..."."""
    queries = [{**row, "lang": "zh/tw"} for row in COLLECTION.queries]
    folder = write_collection(tmp_path / "x", dataclasses.replace(COLLECTION, queries=queries))
    results = evaluate(PLANE, "retrieval", folder)
    assert "retrieval/x/zh_tw-en/ndcg@10" in results


def test_a_string_and_a_list_of_one_are_the_same_pair(tmp_path):
    pairs = [{"query": f"x{i}", "pos": f"long text {i}"} for i in range(5)]
    lists = [row | {"pos": [row["pos"]]} for row in pairs]
    one, two = (evaluate(Vectors(), "bitext", write_lines(tmp_path / name / "pairs.jsonl", rows))
                 for name, rows in (("a", pairs), ("b", lists)))
    assert list(one.values()) == list(two.values())


def test_the_held_out_split_is_chosen(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": i, "split": split}
        for split in ("train", "dev") for i in range(3)
    ]
    assert collection.choose_split(rows, None, "f") == (rows[3:], "dev")
    assert collection.choose_split(rows, "train", "f") == (rows[:3], "train")
    assert collection.choose_split(rows[:3], None, "f") == (rows[:3], "all")
    bare = [{"sentence1": "a", "sentence2": "b", "score": 1}]
    assert collection.choose_split(bare, None, "f") == (bare, "all")
    with pytest.raises(ValueError, match="f: no rows of split 'dev', as none has a split"):
        collection.choose_split(bare, "dev", "f")
    assert collection.choose_split(rows, None, "f", with_train=True) == (rows, "dev")
    path = write_lines(tmp_path / "my_sts.jsonl", rows)
    assert evaluate(Vectors(), "sts", path).keys() == {"sts/my_sts/dev/spearman"}
    with pytest.raises(ValueError, match=r"my_sts.jsonl: no rows of split \['test'\], only"):
        evaluate(Vectors(), "sts", path, split="test")


def test_rows_per_language_and_their_mean(tmp_path):
    rows = [
        {"sentence1": f"s{i}", "sentence2": f"t{i}", "score": i, "lang": "zh" if i % 2 else "en"}
        for i in range(10)
    ]
    path = write_lines(tmp_path / "stsb" / "data.jsonl.gz", rows)
    results = evaluate(Vectors(), "sts", path)
    assert results.keys() == {f"sts/stsb/{group}/spearman" for group in ("en", "zh", "mean")}
    english = evaluation.sts(Vectors(), rows[::2])["spearman"]
    assert results["sts/stsb/en/spearman"] == pytest.approx(english)
    both = results["sts/stsb/en/spearman"], results["sts/stsb/zh/spearman"]
    assert results["sts/stsb/mean/spearman"] == pytest.approx(np.mean(both))


def test_both_forms_of_bitext(tmp_path):
    wide = [{"query": f"x{i}", "pos": f"e{i}", "lang_q": "xx", "lang_p": "en"} for i in range(5)]
    long = [{"id": i, "lang": "xx", "text": f"x{i}"} for i in range(5)]
    long += [{"id": i, "lang": "en", "text": f"e{i}"} for i in range(7)]
    one = evaluate(Vectors(), "bitext", write_lines(tmp_path / "set" / "pairs.jsonl", wide))
    two = evaluate(Vectors(), "bitext", write_lines(tmp_path / "set" / "sentences.jsonl", long))
    assert one == two and "bitext/set/xx-en/accuracy_reverse" in one


LONG = [{"id": i, "lang": "xx", "text": "a"} for i in range(2)]


@pytest.mark.parametrize("rows, reason", [
    ([*LONG, LONG[0]], "1 rows repeat"), (LONG, "no id occurs"), ([], "no rows"),
    ([{**LONG[0], "lang": ""}], "no id occurs"),
    ([{"query": "x"}], "bad.jsonl:1: key 'pos' is missing"),
    ([LONG[0], {"id": 2, "text": "a"}], "bad.jsonl:2: key 'lang' is missing"),
    ([{"query": "x", "pos": ["a", "b"]}], "bad.jsonl: bitext needs one pos a row")])
def test_broken_bitext_is_named(tmp_path, rows, reason):
    with pytest.raises(ValueError, match=reason):
        evaluate(Vectors(), "bitext", write_lines(tmp_path / "bad.jsonl", rows))


def test_a_label_that_is_neither_0_nor_1_is_named_by_line(tmp_path):
    row = {"sentence1": "a", "sentence2": "b"}
    path = write_lines(tmp_path / "bad.jsonl", [{**row, "label": 1}, {**row, "label": 2}])
    with pytest.raises(ValueError, match="bad.jsonl:2: key 'label' must be 0 or 1, not 2"):
        evaluate(Vectors(), "pair_classification", path)


def test_texts_without_a_partner_are_counted(tmp_path, capsys):
    rows = [*LONG, {"id": "1", "lang": "en", "text": "b"}]         # an id is one, however written
    evaluate(Vectors(), "bitext", write_lines(tmp_path / "set.jsonl", rows))
    assert "set.jsonl: 1 texts have no partner in 'en'" in capsys.readouterr().out


@pytest.mark.parametrize("score", [1e39, 10 ** 400])
def test_a_score_that_is_no_float_is_named_by_line(tmp_path, score):
    row = {"sentence1": "a", "sentence2": "b"}
    path = write_lines(tmp_path / "bad.jsonl", [{**row, "score": 1}, {**row, "score": score}])
    with pytest.raises(ValueError, match="bad.jsonl:2: key 'score' must be a finite number"):
        evaluate(Vectors(), "sts", path)


@pytest.mark.extras
def test_classification_keeps_the_training_rows(tmp_path):
    known, train = labelled(12, split="train")
    more, test = labelled(12, split="test")
    for row in train + test:
        row["lang"] = "en" if int(row["text"][1]) % 2 else "de"
    path = write_lines(tmp_path / "topics.jsonl", train + test)
    results = evaluate(Vectors(known | more), "classification", path)
    assert results["classification/topics/mean/accuracy"] > 0.9
    assert {key.split("/")[2] for key in results} == {"en", "de", "mean"}
    path = write_lines(tmp_path / "untrained.jsonl", test)
    with pytest.raises(ValueError, match=r"no rows of split \['train'\]"):
        evaluate(Vectors(more), "classification", path)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    folder = write_collection(tmp_path / "docs", COLLECTION)
    out = tmp_path / "deep" / "scores.json"
    argv = ["eval.py", "--bm25", f"--retrieval={folder}", f"--out={out}"]
    monkeypatch.setattr("sys.argv", argv)
    evaluation.main()
    results = json.loads(out.read_text())
    assert results["retrieval/docs/all/ndcg@10"] == 0.0  # not a word in common
    shown = capsys.readouterr().out
    assert "retrieval/docs/fr-en" in shown and str(out) in shown
    monkeypatch.setattr("sys.argv", [*argv[:2], f"--retrieval={folder},{folder}", argv[3]])
    with pytest.raises(SystemExit, match=r"^eval.py: error: .*rename it"):
        evaluation.main()


def test_the_command_lines_options_reach_the_scores(tmp_path, monkeypatch):
    folder, out = write_collection(tmp_path / "docs", COLLECTION), tmp_path / "scores.json"
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / "dev.tsv")
    asked = {}

    def noted(encoder, collection, *args, **more):
        asked["ignore"] = collection.without_self
        return retrieval(encoder, collection, *args, **more)
    retrieval = evaluation.retrieval
    monkeypatch.setattr(evaluation, "retrieval", noted)
    monkeypatch.setattr(evaluation, "Embedder", lambda path: PLANE)
    monkeypatch.setattr("sys.argv", [
        "eval.py", "--checkpoint=x", f"--retrieval={folder}", f"--out={out}", "--split=dev",
        "--dims=1", "--ignore_identical_ids=true"])
    evaluation.main()
    results = json.loads(out.read_text())
    assert {"retrieval/docs/dev/ndcg@10", "retrieval/docs/dev/ndcg@10:1"} < set(results)
    assert asked["ignore"] == {"q0", "q1", "q2"}


def test_scores_are_saved_after_each_set(tmp_path, monkeypatch):
    """A set that cannot be scored must not cost the sets before it."""
    folder, out = write_collection(tmp_path / "docs", COLLECTION), tmp_path / "scores.json"
    monkeypatch.setattr("sys.argv", ["eval.py", "--bm25", f"--retrieval={folder},missing",
                                     f"--out={out}"])
    with pytest.raises(SystemExit, match="missing"):
        evaluation.main()
    assert "retrieval/docs/all/ndcg@10" in json.loads(out.read_text())


def test_each_model_has_a_file_of_its_own(tmp_path):
    """Scores of two models, or of two checkpoints, must never meet in one file."""
    config = evaluation.EvalConfig
    for folder in (tmp_path, tmp_path / "step_000007"):
        assert config(checkpoint=str(folder)).place == folder / "eval.json"
    assert config(sentence_transformer=str(tmp_path)).place == tmp_path / "eval.json"
    assert config(bm25=True).place == Path("out/eval_bm25.json")
    assert config(sentence_transformer="org/name").place == Path("out/eval_org_name.json")
    assert config(bm25=True, out="x.json").place == Path("x.json")


def test_a_set_is_not_replaced_by_its_scores():
    with pytest.raises(ValueError, match="set.jsonl: the input would be replaced"):
        evaluation.EvalConfig(bm25=True, sts=("set.jsonl",), out="set.jsonl")


def test_the_file_of_a_stage_that_is_not_scored_yet_is_left_to_train(tmp_path):
    """A stage with an eval.json is finished: train.py would never score it."""
    (tmp_path / ".lock").touch()
    with pytest.raises(ValueError, match="eval.json is missing, and train.py's to begin"):
        evaluation.run(evaluation.EvalConfig(checkpoint=str(tmp_path)))
    (tmp_path / "eval.json").write_text("{}")      # the lock of a run stays for ever
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluation.run(evaluation.EvalConfig(checkpoint=str(tmp_path)))
    (tmp_path / "eval.json").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluation.run(evaluation.EvalConfig(checkpoint=str(tmp_path), out=str(tmp_path / "o")))


def test_what_was_measured_before_stays_in_the_runs_file(tmp_path, monkeypatch, capsys):
    """The run's own numbers, DHNM's too, outlive a later evaluation; --out begins afresh."""
    monkeypatch.chdir(tmp_path)
    folder = write_collection(tmp_path / "docs", COLLECTION)
    own = {"sts/my/test/spearman": 5, "retrieval/docs/all/ndcg@10": 0.5}
    kept = tmp_path / "out" / "eval_bm25.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(own))
    argv = ["eval.py", "--bm25", f"--retrieval={folder}"]
    monkeypatch.setattr("sys.argv", argv)
    evaluation.main()
    merged = json.loads(kept.read_text())
    assert merged["sts/my/test/spearman"] == 5
    assert merged["retrieval/docs/all/ndcg@10"] == 0.0         # measured anew
    assert "beside 1 earlier numbers; 1 others replace earlier values" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*argv, f"--out={kept}"])
    evaluation.main()
    assert json.loads(kept.read_text()).keys() == merged.keys() - own.keys() | {
        "retrieval/docs/all/ndcg@10"}
    kept.write_text("[1")
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="eval_bm25.json: no JSON object"):
        evaluation.main()
    assert kept.read_text() == "[1"


@pytest.mark.parametrize("options, reason", [
    ({}, "one of --checkpoint"), ({"checkpoint": "x", "bm25": True}, "one of --checkpoint"),
    ({"bm25": True, "dims": (64,)}, r"dims=\(64,\): BM25 has no vectors"),
    ({"bm25": True, "mteb": ("STS17",)}, "mteb=.*STS17.* needs a --checkpoint"),
    ({"checkpoint": "x", "mteb": ("STS17",), "split": "dev"}, "split=dev .* are not for mteb"),
    ({"checkpoint": "x", "mteb": ("STS17",), "ignore_identical_ids": False}, "are not for mteb")])
def test_options_that_do_not_fit(options, reason):
    with pytest.raises(ValueError, match=reason):
        evaluation.EvalConfig(**options)


def test_scores_are_shown_by_subset_and_dim():
    shown = evaluation.table({"sts/a/en/spearman": 0.25, "sts/a/en/spearman:64": 0.125})
    assert shown.split("\n") == ["sts/a/en           spearman 0.2500",
                                 "sts/a/en, 64 dims  spearman 0.1250"]


def test_sft_is_validated_causally_on_the_document_that_answers_best(tmp_path, tokenizer):
    write_lines(tmp_path / "dev/corpus.jsonl", [{"id": i, "text": i} for i in ("best", "worse")])
    write_lines(tmp_path / "dev/queries.jsonl", [{"id": "q", "text": "asked"}])
    (tmp_path / "dev/qrels.tsv").write_text("q\tbest\t2\nq\tworse\t1\n")
    model = tiny_model(std=0.3, vocab_size=tokenizer.vocab_size)
    state = validated(model, tokenizer, stage="sft", data=str(tmp_path))
    loss = causal_loss(state, [("Find", "asked", "best")])
    assert evaluation.validation_loss(state) == loss
    corpus = tmp_path / "dev/corpus.jsonl"
    (tmp_path / "dev/corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    assert evaluation.validation_loss(state) == loss


@pytest.mark.parametrize("micro_batch_size", [0, 7])
def test_validation_loss_is_a_mean_over_tokens(tmp_path, tokenizer, micro_batch_size):
    """More texts than are scored at once, of unequal lengths."""
    texts = ["the quick brown fox" * (1 + i // 20) for i in range(60)]
    write_lines(tmp_path / "text_dev.jsonl", [{"text": text} for text in texts])
    model = tiny_model(std=0.3, vocab_size=tokenizer.vocab_size)
    state = validated(model, tokenizer, stage="pretrain", data=str(tmp_path), query_len=8,
                      passage_len=9, micro_batch_size=micro_batch_size)     # the longest are cut
    loss, sizes, part = causal_loss(state, [(None, "", text) for text in texts]), [], model.forward
    model.forward = lambda ids, lengths, *rest: sizes.append(
        len(lengths) + 99 * torch.is_grad_enabled()) or part(ids, lengths, *rest)
    assert evaluation.validation_loss(state) == loss
    assert max(sizes) == (micro_batch_size or 50)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_labelled_rows_may_be_packed(tmp_path, suffix):
    for name in ("sts_test.jsonl", "labels_test.jsonl"):
        (tmp_path / f"{name}{suffix}").touch()
    assert evaluation.labelled_files(TrainConfig(data=str(tmp_path))) == {
        "sts": tmp_path / f"sts_test.jsonl{suffix}",
        "classification": tmp_path / f"labels_test.jsonl{suffix}"}


@pytest.mark.parametrize("trusted", [None, False, True])
def test_a_model_with_code_of_its_own_needs_a_word(monkeypatch, trusted):
    """Else sentence-transformers may take another model of the same name for it, in silence."""
    seen, config = [], {"auto_map": {"AutoModel": "modeling.Model"}}
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        PretrainedConfig=SimpleNamespace(get_config_dict=lambda name: (config, {}))))
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(
        SentenceTransformer=lambda name, trust_remote_code: seen.append(trust_remote_code)))
    if trusted is None:
        with pytest.raises(ValueError, match="org/x brings code of its own"):
            evaluation.SentenceTransformerBaseline("org/x")
    else:
        evaluation.SentenceTransformerBaseline("org/x", trusted)
    assert seen == [trusted] * (trusted is not None)


def test_scores_that_another_process_adds_meanwhile_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_collection(tmp_path / "docs", COLLECTION)
    path = tmp_path / "out" / "eval_bm25.json"
    path.parent.mkdir()
    score = evaluation.evaluate

    def slow(*args):
        path.write_text('{"sts/other/test/spearman": 0.5}')
        return score(*args)
    monkeypatch.setattr(evaluation, "evaluate", slow)
    evaluation.run(evaluation.EvalConfig(bm25=True, retrieval=(str(folder),)))
    assert json.loads(path.read_text()).keys() > {"sts/other/test/spearman"}


def test_a_collection_without_a_judged_query_shows_before_a_run(tmp_path):
    write_lines(tmp_path / "test/corpus.jsonl", [{"id": "d", "text": "a"}])
    write_lines(tmp_path / "test/queries.jsonl", [{"id": "q", "text": "a", "answers": ["a"]}])
    with pytest.raises(ValueError, match="test: no query has a judged document"):
        collection.read_ahead([TrainConfig(data=str(tmp_path))])


@pytest.mark.parametrize("lang, rows", [
    ("de", ("a train en", "b train en", "a test en", "a test de")),     # no row to fit
    ("en", ("a train en", "a train en", "a test en")),                  # one label
    ("de", ("a train en", "b train en", "a test en", "a train de", "b train de")),  # none to score
    ("de", ("a train en", "b train en", "a test de"))])                 # both
def test_labels_that_cannot_be_fitted_show_before_a_run(tmp_path, lang, rows):
    write_lines(tmp_path / "labels_test.jsonl", [
        {"text": "t", **dict(zip(("label", "split", "lang"), row.split()))} for row in rows])
    with pytest.raises(ValueError, match=f"labels_test.jsonl: '{lang}' needs rows of two labels"):
        collection.read_ahead([TrainConfig(data=str(tmp_path))])


def test_a_run_is_scored_on_what_is_named_or_on_its_folders_test_splits(tmp_path):
    folder = tmp_path / "data [1]"
    for name in ("b/clr_test", "dev", "clr_dev", "search", "held_out/x", "../elsewhere/test"):
        write_lines(folder / name / "corpus.jsonl", [{"id": "d", "text": "a"}])
    (folder / "test").symlink_to(tmp_path / "elsewhere/test")
    cfg = TrainConfig(data=str(folder))
    assert evaluation.collections(cfg) == [folder / "b/clr_test", folder / "test"]
    named = dataclasses.replace(cfg, evaluate=("x/dev", "y/dev"))
    assert evaluation.collections(named) == [Path("x/dev"), Path("y/dev")]
    both = dataclasses.replace(cfg, evaluate=("x/dev", "x/test"))      # two splits of one set
    assert evaluation.collections(both) == [Path("x/dev"), Path("x/test")]
    files = dataclasses.replace(cfg, retrieval=("rows.jsonl",))
    assert evaluation.collections(files) == []


def test_a_folder_may_be_asked_for_the_split_that_it_is_named_after(tmp_path, monkeypatch):
    folder = tmp_path / "x/test"
    write_lines(folder / "corpus.jsonl", [{"id": "d", "text": "a"}])
    write_lines(folder / "queries.jsonl", [{"id": "q", "text": "a"}])
    (folder / "qrels.tsv").write_text("q\td\t1\n")
    scores = evaluate(LexicalBaseline(), "retrieval", folder)
    assert scores["retrieval/x/test/ndcg@10"] == 1
    assert evaluate(LexicalBaseline(), "retrieval", folder, split="test") == scores
    monkeypatch.chdir(folder.parent)               # a name of one part is in a folder, too
    assert evaluate(LexicalBaseline(), "retrieval", "test") == scores
    with pytest.raises(ValueError, match="no query of split 'dev' has a judged document"):
        evaluate(LexicalBaseline(), "retrieval", folder, split="dev")


@pytest.mark.parametrize("text, gain, left_out", [("a", 0, True), ("b", 0, False), ("a", 1, False)])
def test_a_query_that_is_a_document_leaves_its_own_ranking(tmp_path, text, gain, left_out):
    """With a warning: of equal id and text, and not judged relevant to itself, as in ArguAna.

    Another query's id may be a document's by chance.
    """
    write_lines(tmp_path / "corpus.jsonl", [{"id": "q", "text": text}, {"id": "d", "text": "c"}])
    write_lines(tmp_path / "queries.jsonl", [{"id": "q", "text": "a"}, {"id": "d", "text": "b"}])
    (tmp_path / "qrels.tsv").write_text(f"q\td\t1\nq\tq\t{gain}\nd\td\t1\n")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_collection(tmp_path).without_self == ({"q"} if left_out else set())
        assert not load_collection(tmp_path, ignore_identical_ids=False).without_self
    assert ["1 queries are documents too, 'q' first" in str(w.message) for w in said] == \
        [True] * left_out


def test_which_qrels_of_several_are_read(tmp_path):
    folder = write_beir(tmp_path / "x", ("dev", "test"))
    assert load_collection(folder).split == "test"
    (folder / "qrels.tsv").write_text("q0 0 d0 1".replace(" ", "\t") + "\n")       # TREC's form
    assert load_collection(folder).qrels == {"q0": {"d0": 1.0}}
    assert load_collection(folder).split is None
    assert load_collection(folder, "dev").split == "dev"


def test_the_test_split_is_scored_where_there_are_both():
    rows = [{"split": split} for split in ("dev", "validation", "test")]
    assert [collection.choose_split(rows[:n], None, "f")[1] for n in (3, 2)] == ["test", "dev"]


def test_english_is_the_pivot_and_without_it_the_first_language():
    rows = [{"id": 1, "lang": lang, "text": lang} for lang in ("de", "en")]
    assert collection.align(rows, "f") == [
        {"query": "de", "pos": "en", "lang_q": "de", "lang_p": "en"}]
    rows = [{"id": 1, "lang": lang, "text": lang} for lang in ("fr", "de")]
    assert collection.align(rows, "f") == [
        {"query": "fr", "pos": "de", "lang_q": "fr", "lang_p": "de"}]
