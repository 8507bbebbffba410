"""The bridge to mteb: its own check passes, and two models never get each other's scores.

    pip install mteb && pytest -m extras tests/test_mteb.py
"""

import json
import types
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from data import PROMPTS
from embed import Embedder
from engine import checkpoint
from engine.encoders import flat_scores, mteb_tasks
from eval import MTEBModel, evaluate_mteb, join_names
from ranks import write_run
from tools.export import export

COLUMNS = {"Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS"}


class Counted:
    """An encoder that draws a vector for each text and notes what it was asked."""
    checkpoint, max_len, prompts = Path("run/step_000001"), 64, PROMPTS

    def __init__(self, dim=8, seed=0):
        self.dim, self.seed, self.asked = dim, seed, []

    def fingerprint(self):
        return f"seed {self.seed}"

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True):
        self.asked.append((prompt, list(texts)))
        vectors = np.array([self._one(f"{prompt}{text}") for text in texts], dtype=np.float32)
        vectors = vectors[:, :truncate_dim]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _one(self, text):
        return np.random.default_rng([self.seed, *text.encode()]).normal(size=self.dim)


@pytest.fixture(scope="module")
def save(tokenizer, tmp_path_factory):
    """Return a function that writes a tiny checkpoint with random weights."""
    def save(name="embed_sup", seed=0):
        return write_run(tmp_path_factory.mktemp("run") / name, tokenizer, seed, passage_len=32,
                         train={"stage": name, "steps": 3, "dims": [4, 8]},
                         versions={"git": None, "torch": "2"})
    return save


@pytest.fixture(scope="module")
def mocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("mteb", minversion="2")
        from mteb.mocks import mock_tasks

        yield mock_tasks


@pytest.fixture
def choose(mocks, monkeypatch):
    """Let mteb know its mock tasks by name, and one benchmark of three of them."""
    import mteb

    some = (mocks.MockSTSTask, mocks.MockMultilingualSTSTask, mocks.MockRetrievalTask)
    named = {task.metadata.name: task for task in some}

    def get_tasks(tasks):
        if unknown := set(tasks) - set(named):
            raise KeyError(f"KeyError: '{min(unknown)}' not found.")
        return [named[name]() for name in tasks]

    def get_benchmark(name):
        if name != "MTEB(mock, v1)":
            raise KeyError(f"'{name}' not found.")
        return types.SimpleNamespace(tasks=[task() for task in some])

    monkeypatch.setattr(mteb, "get_tasks", get_tasks)
    monkeypatch.setattr(mteb, "get_benchmark", get_benchmark)


# ---------------------------------------------------------------- names and numbers

def test_a_benchmarks_name_may_hold_a_comma():
    assert join_names(("STS17", "MTEB(eng", "v2)", "MTEB(cmn", "v1)", "X")) == [
        "STS17", "MTEB(eng, v2)", "MTEB(cmn, v1)", "X"]
    assert join_names(("MTEB(eng, v2)",)) == ["MTEB(eng, v2)"] and join_names(()) == []


def test_scores_become_flat():
    task = types.SimpleNamespace(metadata=types.SimpleNamespace(name="T", main_score="ap"))
    one, two = {"hf_subset": "default", "main_score": 0.5}, {"hf_subset": "a/b", "main_score": 1}
    assert flat_scores(task, {"test": [one]}) == {"mteb/T/test/ap": 0.5}
    assert flat_scores(task, {"test": [two]}) == {"mteb/T/a_b/ap": 1.0}
    assert flat_scores(task, {"dev": [one], "test": [two]}) == {
        "mteb/T/dev/ap": 0.5, "mteb/T/test-a_b/ap": 1.0}


def test_without_mteb_the_command_says_what_to_install(save, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    argv = ["eval.py", f"--checkpoint={save()}", "--mteb=STS17", f"--out={tmp_path / 'x.json'}"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="^eval.py: error: mteb is not installed: pip "):
        evaluation.main()


# ---------------------------------------------------------------- the model

@pytest.mark.extras
def test_mtebs_own_check_passes(mocks, save):
    """mteb's mock run: all its text tasks, tiny and offline, through the whole of mteb.evaluate."""
    import mteb

    run = mteb.mock_run(MTEBModel(Embedder(save())))
    ran = {name: result for name, result in run.items() if result is not None}
    failed = {n: r.exception for n, r in ran.items() if hasattr(r, "exception")}
    assert len(ran) >= 28 and not failed


@pytest.mark.extras
def test_the_name_and_the_revision_tell_models_apart(mocks, save, tmp_path):
    run, other = save(), save(seed=1)
    meta = MTEBModel(Embedder(run)).mteb_model_meta
    assert meta.name == "nanoconan/embed_sup" and meta.revision == Embedder(run).fingerprint()
    assert meta.revision == MTEBModel(Embedder(checkpoint.latest(run))).mteb_model_meta.revision
    assert meta.revision != MTEBModel(Embedder(other)).mteb_model_meta.revision
    assert MTEBModel(Embedder(run), dim=4).mteb_model_meta.revision == f"{meta.revision}-4"
    assert meta.embed_dim == 16 and meta.max_tokens == 32
    exported = MTEBModel(Embedder(export(run, tmp_path / "mine"))).mteb_model_meta
    assert exported.name == "nanoconan/mine" and exported.revision != meta.revision


@pytest.mark.extras
def test_batches_become_rows_of_the_first_dimensions(mocks):
    about = types.SimpleNamespace(type="STS")
    batches, model = [{"text": ["a", "b"]}, {"text": ["c"]}], MTEBModel(Counted(), dim=4)
    found = model.encode(batches, task_metadata=about)
    assert np.array_equal(found, Counted(4).encode(["a", "b", "c"], prompt=PROMPTS["sts"]))
    assert model.similarity(found[0], found[:2]).shape == (1, 2)
    assert model.similarity_pairwise(found, found).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.extras
def test_a_cache_keeps_two_models_apart(mocks, tmp_path):
    """Without a name of its own the second model would be given the scores of the first."""
    import mteb

    cache = mteb.ResultCache(tmp_path)
    scores = [mteb.evaluate(MTEBModel(Counted(seed=seed)), mocks.MockRerankingTask(), cache=cache)
              .task_results[0].scores["test"][0]["hit_rate_at_1"] for seed in range(6)]
    files = list(tmp_path.rglob("MockRerankingTask.json"))
    assert len(set(scores)) > 1 and len(files) == 6


@pytest.mark.extras
@pytest.mark.parametrize(("name", "prompts"), [
    ("MockRetrievalTask", {"retrieval", None}), ("MockRerankingTask", {"retrieval", None}),
    ("MockInstructionRetrieval", {"retrieval", None}),
    ("MockClassificationTask", {"classification"}),
    ("MockMultilabelClassification", {"classification"}), ("MockSTSTask", {None}),
    ("LegacyMockClusteringFastTask", {None}), ("MockSummarizationTask", {None})])
def test_prompts_go_by_the_type_of_task(mocks, name, prompts):
    import mteb

    model = MTEBModel(Counted())
    mteb.evaluate(model, getattr(mocks, name)(), cache=None)
    assert {prompt or None for prompt, _ in model.encoder.asked} == {
        p and PROMPTS[p] for p in prompts}
    if "retrieval" in prompts:
        texts = {bool(prompt): text for prompt, text in model.encoder.asked}
        assert "test sentence" in texts[True][0] and "positive sentence" in texts[False][0]


@pytest.mark.extras
@pytest.mark.parametrize("name", [
    "MockRetrievalTask", "MockRerankingTask", "MockClassificationTask", "MockSTSTask",
    "LegacyMockClusteringFastTask", "MockPairClassificationTask", "MockBitextMiningTask"])
def test_an_exported_model_scores_the_same_in_mtebs_own_wrapper(mocks, save, tmp_path, name):
    """Prompts too: mteb finds those of the export by task type."""
    library = pytest.importorskip("sentence_transformers", minversion="6")
    import mteb

    run = save()
    theirs = library.SentenceTransformer(str(export(run, tmp_path / "x")), device="cpu")
    a, b = (mteb.evaluate(model, getattr(mocks, name)(), cache=None).task_results[0].scores
            for model in (MTEBModel(Embedder(run)), theirs))
    assert a.keys() == b.keys()
    for split in a:
        for ours, other in zip(a[split], b[split]):
            assert ours["main_score"] == pytest.approx(other["main_score"], abs=1e-4)


# ---------------------------------------------------------------- the command line

@pytest.mark.extras
def test_tasks_and_benchmarks_by_name(choose, tmp_path):
    encoder = Counted()
    found = evaluate_mteb(encoder, "MockSTSTask", tmp_path)
    assert list(found) == ["mteb/MockSTSTask/test/cosine_spearman"]
    results = evaluate_mteb(encoder, "MTEB(mock, v1)", tmp_path, dims=(4,))
    names = {"mteb/MockSTSTask/test/cosine_spearman", "mteb/MockRetrievalTask/val/ndcg_at_10",
             "mteb/MockRetrievalTask/test/ndcg_at_10",
             "mteb/MockMultilingualSTSTask/eng/cosine_spearman",
             "mteb/MockMultilingualSTSTask/fra/cosine_spearman"}
    means = {f"mteb/MTEB(mock, v1)/{kind}/mean" for kind in ("STS", "Retrieval", "tasks", "types")}
    assert set(results) == {f"{name}{cut}" for name in names | means for cut in ("", ":4")}
    each = [results[f"mteb/{n}"] for n in (
        "MockSTSTask/test/cosine_spearman", "MockMultilingualSTSTask/eng/cosine_spearman",
        "MockMultilingualSTSTask/fra/cosine_spearman", "MockRetrievalTask/val/ndcg_at_10",
        "MockRetrievalTask/test/ndcg_at_10")]
    sts = (each[0] + (each[1] + each[2]) / 2) / 2
    retrieval = (each[3] + each[4]) / 2
    assert results["mteb/MTEB(mock, v1)/STS/mean"] == pytest.approx(sts)
    assert results["mteb/MTEB(mock, v1)/types/mean"] == pytest.approx((sts + retrieval) / 2)
    assert results["mteb/MTEB(mock, v1)/tasks/mean"] == pytest.approx((2 * sts + retrieval) / 3)
    with pytest.raises(ValueError, match="no such task or benchmark: 'nothing'"):
        evaluate_mteb(encoder, "nothing", tmp_path)


@pytest.mark.extras
@pytest.mark.parametrize(("name", "tasks", "columns"), [
    ("MTEB(eng, v2)", 41, COLUMNS | {"Summarization"}), ("MTEB(cmn, v1)", 31, COLUMNS)])
def test_the_papers_benchmarks_resolve_offline(mocks, name, tasks, columns):
    """All their tasks have a column of Table 1, by mteb's own list: no download for that."""
    found, is_benchmark = mteb_tasks(name)
    assert is_benchmark and len(found) >= tasks
    assert {task.metadata.type for task in found} == columns
    assert [task.metadata.name for task in mteb_tasks("STS17")[0]] == ["STS17"]


@pytest.mark.extras
def test_what_is_scored_already_is_not_run_again(choose, tmp_path):
    first, second = Counted(), Counted()
    scores = evaluate_mteb(first, "MockRetrievalTask", tmp_path)
    assert evaluate_mteb(second, "MockRetrievalTask", tmp_path) == scores
    assert first.asked and not second.asked


@pytest.mark.extras
def test_a_benchmark_leaves_out_what_another_run_scored(choose, mocks, tmp_path, monkeypatch):
    """A benchmark may want one language of a task; mteb's cache hands out all that it has."""
    import mteb

    evaluate_mteb(Counted(), "MockMultilingualSTSTask", tmp_path)
    task = mocks.MockMultilingualSTSTask().filter_languages(["eng"])
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: types.SimpleNamespace(tasks=[task]))
    scores = evaluate_mteb(Counted(), "MTEB(mock, v1)", tmp_path)
    own = scores.pop("mteb/MockMultilingualSTSTask/eng/cosine_spearman")
    assert set(scores.values()) == {own} and "fra" not in str(scores)


@pytest.mark.extras
def test_the_command_line(choose, save, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores.json"
    monkeypatch.setattr("sys.argv", ["eval.py", f"--checkpoint={save()}", f"--out={out}",
                                     "--mteb=MockSTSTask,MTEB(mock, v1)", "--dims=8"])
    evaluation.main()
    results, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert "mteb/MTEB(mock, v1)/tasks/mean:8" in results
    assert "mteb/MTEB(mock, v1)" in shown and "Retrieval, 8 dims" in shown
    theirs = sorted((tmp_path / "mteb").rglob("MockSTSTask.json"))     # and in mteb's own form
    scores = [json.loads(path.read_text())["scores"]["test"][0]["main_score"] for path in theirs]
    ours = [results[f"mteb/MockSTSTask/test/cosine_spearman{cut}"] for cut in ("", ":8")]
    assert sorted(scores) == pytest.approx(sorted(ours), abs=1e-5)
