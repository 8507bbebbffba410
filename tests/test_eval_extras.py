"""Every metric equals scipy's or scikit-learn's, every task gives mteb's own score.

    pip install scipy scikit-learn mteb && pytest -m extras tests/test_eval_extras.py
"""

import json
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from data import PROMPTS
from engine import metrics
from engine.collection import Collection
from eval import MTEBModel

pytestmark = pytest.mark.extras


class Drawn:
    """One random vector per text; texts of one topic ("topic:...") lie around a common one."""
    checkpoint, dim, max_len, prompts = Path("run/step_000001"), 24, 64, PROMPTS

    def __init__(self, noise=1.0):
        self.noise = noise

    def fingerprint(self):
        return "0" * 16

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True):
        vectors = np.array([self._one(text) for text in texts], dtype=np.float32)[:, :truncate_dim]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _one(self, text):
        topic, own = (np.random.default_rng(list(t.encode())) for t in (text.split(":")[0], text))
        return topic.normal(size=self.dim) + self.noise * own.normal(size=self.dim)


# ---------------------------------------------------------------- scipy and scikit-learn


def drawn_scores(seed, ties):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(2, 200))
    return (np.round(x), np.round(y + x)) if ties else (x, y + x)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_scipys(seed, ties):
    stats = pytest.importorskip("scipy.stats")
    x, y = drawn_scores(seed, ties)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_scikit_learns(seed, ties):
    learn = pytest.importorskip("sklearn.metrics")
    scores, other = drawn_scores(seed, ties)
    labels = (other > 0).astype(int)
    expected = learn.average_precision_score(labels, scores)
    assert metrics.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- mteb


def mteb_scores(mock, encoder, data):
    """Run an mteb task on our data: the class of one of its offline mocks, the data replaced."""
    task = mock()
    task.load_data = lambda *args, **kwargs: None
    task.dataset, task.data_loaded = data, True
    scores = task.evaluate(MTEBModel(encoder), split="test", encode_kwargs={"batch_size": 32})
    return scores["default"]


def table(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


@pytest.fixture
def mocks():
    pytest.importorskip("mteb", minversion="2")
    from mteb.mocks import mock_tasks

    return mock_tasks


def drawn_collection(n_documents=1300, n_queries=40):
    draw = np.random.default_rng(0)
    corpus = [
        {"id": f"d{i}", "title": f"t{i % 100}:" if i % 3 else "", "text": f"t{i % 100}:{i}"}
        for i in range(n_documents)
    ]
    queries = [{"id": f"q{i}", "text": f"t{i}:query"} for i in range(n_queries)]
    qrels = {}
    for i, query in enumerate(queries[:-2]):  # two have no judgement
        own = draw.choice(np.arange(i, n_documents, 100), size=1 + i % 7, replace=False)
        other = draw.choice(n_documents, size=3, replace=False)
        grades = {f"d{j}": int(draw.integers(1, 4)) for j in own} | {f"d{j}": 0 for j in other}
        qrels[query["id"]] = grades if i else {f"d{other[0]}": 0}  # the first has none above 0
    return Collection(corpus, queries, qrels)


def mteb_retrieval(mock, encoder, collection):
    """Return mteb's own scores of a collection."""
    return mteb_scores(mock, encoder, {"default": {"test": {
        "corpus": table(collection.corpus), "queries": table(collection.queries),
        "relevant_docs": {query: {doc: int(gain) for doc, gain in gains.items()}
                          for query, gains in collection.qrels.items()}, "top_ranked": None}}})


def test_retrieval_is_mtebs(mocks):
    collection, encoder = drawn_collection(), Drawn(noise=1.5)
    ours = evaluation.retrieval(encoder, collection)
    collection.queries = [row for row in collection.queries if row["id"] in collection.qrels]
    expected = mteb_retrieval(mocks.MockRetrievalTask, encoder, collection)
    names = {f"recall@{k}": f"recall_at_{k}" for k in (1, 10, 20, 100)}
    names |= {"ndcg@10": "ndcg_at_10", "map": "map_at_1000", "mrr@10": "mrr_at_10"}
    names |= {"hit@1": "hit_rate_at_1"}
    assert ours.keys() == names.keys() and 0.05 < ours["ndcg@10"] < 0.95
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(expected[theirs], abs=1e-5)  # mteb rounds to 5 digits


def beir_folder(folder, collection):
    """Write a collection as BEIR publishes it: `_id`, qrels/test.tsv."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", collection.corpus), ("queries", collection.queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(
            {"_id" if key == "id" else key: value for key, value in row.items()}) + "\n"
            for row in rows))
    lines = [f"{q}\t{d}\t{int(gain)}\n" for q, gains in collection.qrels.items()
             for d, gain in gains.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def test_identical_ids_are_ignored_as_in_mteb(mocks, tmp_path):
    """ArguAna's form: every query is a document too."""
    plain, encoder = drawn_collection(), Drawn(noise=1.5)
    queries = [row for row in plain.queries if row["id"] in plain.qrels]
    own = [{"title": "", **row} for row in queries]
    collection = Collection(plain.corpus + own, queries, plain.qrels)

    class Ignoring(mocks.MockRetrievalTask):
        ignore_identical_ids = True

    folder = beir_folder(tmp_path / "arguana", collection)
    with pytest.warns(UserWarning, match="38 queries are documents too, 'q0' first"):
        ours = evaluation.evaluate(encoder, "retrieval", folder)
    expected = mteb_retrieval(Ignoring, encoder, collection)["ndcg_at_10"]
    assert ours["retrieval/arguana/test/ndcg@10"] == pytest.approx(expected, abs=1e-5)
    ours = evaluation.evaluate(encoder, "retrieval", folder, ignore_identical_ids=False)
    lower = mteb_retrieval(mocks.MockRetrievalTask, encoder, collection)["ndcg_at_10"]
    assert ours["retrieval/arguana/test/ndcg@10"] == pytest.approx(lower, abs=1e-5)
    assert lower < expected - 0.02


def test_retrieval_is_trec_evals_with_ties_and_zeros():
    trec = pytest.importorskip("pytrec_eval")
    draw = np.random.default_rng(5)
    names = [f"d{i}" for i in draw.permutation(60)]
    known = {name: draw.choice([-0.5, 0.5], 4) for name in names}     # 16 points: exact ties

    class Few(Drawn):
        def _one(self, text):
            return known[text]

    queries = [{"id": f"q{i}", "text": f"d{i}"} for i in range(20)]
    qrels = {f"q{i}": {f"d{j}": int(draw.integers(0, 3)) for j in draw.choice(60, 5, replace=False)}
             if i else {"d1": 0} for i in range(20)}
    corpus = [{"id": name, "text": name} for name in names]
    ours = evaluation.retrieval(Few(), Collection(corpus, queries, qrels))
    runs = {f"q{i}": {name: float(known[f"d{i}"] @ known[name]) for name in names}
            for i in range(20)}
    wanted = {"ndcg_cut_10": "ndcg@10", "recall_10": "recall@10", "map": "map"}
    theirs = trec.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "map"}).evaluate(runs)
    for name, key in wanted.items():
        expected = np.mean([scores[name] for scores in theirs.values()])
        assert ours[key] == pytest.approx(expected, abs=1e-9) and len(theirs) == 20


def test_bitext_mining_is_mtebs(mocks):
    encoder = Drawn(noise=1.5)
    rows = [{"query": f"t{i}:a", "pos": f"t{i}:b"} for i in range(150)]
    ours = evaluation.bitext_mining(encoder, rows)
    assert 0.1 < ours["accuracy"] < 0.9
    for left, right, suffix in (("query", "pos", ""), ("pos", "query", "_reverse")):
        data = table([{"sentence1": row[left], "sentence2": row[right]} for row in rows])
        expected = mteb_scores(mocks.MockBitextMiningTask, encoder, {"test": data})
        assert ours["accuracy" + suffix] == pytest.approx(expected["accuracy"])


def drawn_pairs(n=200):
    draw = np.random.default_rng(1)
    same = draw.integers(0, 2, n)
    return [
        {"sentence1": f"t{i}:a", "sentence2": f"t{i if same[i] else -i}:b", "label": int(same[i]),
         "score": float(np.round(same[i] * 3 + draw.random() * 2, 1))}
        for i in range(n)
    ]


def test_sts_is_mtebs(mocks):
    encoder, rows = Drawn(noise=2.0), drawn_pairs()
    data = {"test": table(rows).select_columns(["sentence1", "sentence2", "score"])}
    expected = mteb_scores(mocks.MockSTSTask, encoder, data)
    ours = evaluation.sts(encoder, rows)["spearman"]
    assert ours == pytest.approx(expected["cosine_spearman"], abs=1e-4)


def test_pair_classification_is_mtebs(mocks):
    encoder, rows = Drawn(noise=2.0), drawn_pairs()
    data = table(rows).rename_column("label", "labels").remove_columns("score")
    expected = mteb_scores(mocks.MockPairClassificationTask, encoder, {"test": data})
    ours = evaluation.pair_classification(encoder, rows)
    assert ours["ap"] == pytest.approx(expected["cosine_ap"], abs=1e-6)


@pytest.mark.parametrize("n_labels", [2, 6])
def test_classification_is_mtebs(mocks, n_labels):
    encoder = Drawn(noise=3.0)
    rows = [
        {"text": f"t{i % n_labels}:{split}{i}", "label": i % n_labels, "split": split}
        for split, n in (("train", 130), ("test", 300)) for i in range(n)
    ]
    data = {
        split: table([row for row in rows if row["split"] == split]).remove_columns("split")
        for split in ("train", "test")
    }
    import datasets

    expected = mteb_scores(mocks.MockClassificationTask, encoder, datasets.DatasetDict(data))
    ours = evaluation.classification(encoder, rows)
    assert 0.2 < ours["accuracy"] < 0.98
    assert ours["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)


WORDS = ["[UNK]", "cat", "dog", "find", "near", "the", "passage", "alike",
         *(f"w{i}" for i in range(90))]


def stock_model(folder, prompts):
    """Save and load a sentence-transformers model of a few words, with prompts."""
    library = pytest.importorskip("sentence_transformers", minversion="6")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(3).normal(size=(len(WORDS), 12)).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    library.SentenceTransformer(modules=[module], prompts=prompts, device="cpu").save(str(folder))
    return evaluation.SentenceTransformerBaseline(str(folder))


def drawn_words(n, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[8:], size=5)) for _ in range(n)]


PROMPTED = [{"query": "find ", "document": "passage "}, {"query": "find ", "passage": "passage "},
            {"query": "find ", "STS": "alike ", "Retrieval-query": "near the "}, {}]


@pytest.mark.parametrize("prompts", PROMPTED)
def test_a_stock_model_gets_mtebs_prompts_for_each_type_of_task(mocks, tmp_path, prompts):
    import mteb

    encoder = stock_model(tmp_path / "stock", prompts)

    def theirs(mock, data):
        task = mock()
        task.load_data = lambda *args, **kwargs: None
        task.dataset, task.data_loaded = data, True
        model = mteb.SentenceTransformerEncoderWrapper(encoder.model)
        return task.evaluate(model, split="test", encode_kwargs={"batch_size": 32})["default"]

    left, right = drawn_words(40), drawn_words(40, seed=1)
    rows = [{"sentence1": a, "sentence2": b, "score": float(i % 7), "label": i % 2}
            for i, (a, b) in enumerate(zip(left, right))]
    expected = theirs(mocks.MockSTSTask, {"test": table(rows).select_columns(
        ["sentence1", "sentence2", "score"])})["cosine_spearman"]
    assert evaluation.sts(encoder, rows)["spearman"] == pytest.approx(expected, abs=1e-5)
    expected = theirs(mocks.MockPairClassificationTask, {"test": table(rows).rename_column(
        "label", "labels").remove_columns("score")})["cosine_ap"]
    assert evaluation.pair_classification(encoder, rows)["ap"] == pytest.approx(expected, abs=1e-5)
    expected = theirs(mocks.MockBitextMiningTask, {"test": table(rows).select_columns(
        ["sentence1", "sentence2"])})
    pairs = [{"query": a, "pos": b} for a, b in zip(left, right)]
    assert evaluation.bitext_mining(encoder, pairs)["accuracy"] == expected["accuracy"]

    corpus = [{"id": f"d{i:02}", "title": "", "text": text} for i, text in enumerate(right)]
    queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(left)]
    qrels = {f"q{i}": {f"d{i:02}": 1} for i in range(40)}
    expected = theirs(mocks.MockRetrievalTask, {"default": {"test": {
        "corpus": table(corpus), "queries": table(queries), "relevant_docs": qrels,
        "top_ranked": None}}})
    ours = evaluation.retrieval(encoder, Collection(corpus, queries, qrels))
    assert ours["ndcg@10"] == pytest.approx(expected["ndcg_at_10"], abs=2e-5)


def test_a_stock_model_in_half_precision_is_scored_in_float32(tmp_path):
    encoder = stock_model(tmp_path / "stock", {})
    encoder.model.half()
    assert encoder.model.encode(["cat"]).dtype == np.float16
    assert encoder.encode(["cat"]).dtype == np.float32


def test_a_stock_model_serves_prefixes(tmp_path):
    encoder = stock_model(tmp_path / "stock", {"query": "find "})
    assert np.linalg.norm(encoder.encode(["cat"])) == pytest.approx(1)
    short = evaluation.CachedEncoder(encoder).first(2).encode(["cat", "dog"])
    assert short.shape == (2, 2) and np.linalg.norm(short[1]) == pytest.approx(1)
    prompts = encoder.prompt_of("retrieval", "query"), encoder.prompt_of("sts")
    assert prompts == (("query", "find "), (None, None))
