"""train.py by its command line: four stages, exact resume, clear errors; made-up rows."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from engine import checkpoint
from embed import Embedder

ROOT = Path(train.__file__).parent
SMALL = ["--n_embd=32", "--n_head=4", "--n_kv_head=2", "--n_layer=1", "--ffn_dim=48",
         "--vocab_size=400", "--block_size=64", "--log_every=1", "--device=cpu",
         "--dtype=float32"]
STAGE = """steps = 6
passage_len = 32
query_len = 16
batch_size = 8
n_negatives = 3
pool_size = 6
"""
WORDS = "sort list tree graph node edge file open read write matrix vector random time".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows about pairs of words: what is asked for is what is described."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = []
    for i in range(64):
        a, b = rng.sample(WORDS, 2)
        rows.append((f"{a} a {b}", f"This function {a}s the {b}, number {i}, and returns it."))
    made = {
        "text": [{"text": f"{q}. {p}"} for q, p in rows],
        "pairs": [{"instruction": "Find", "input": q, "output": p} for q, p in rows],
        "retrieval": [{"query": q, "pos": [p]} for q, p in rows],
        "classification": [{"query": p, "pos": [q.split()[0]],
                            "neg": [w for w in WORDS if w != q.split()[0]][:5]} for q, p in rows],
        "sts": [{"sentence1": q, "sentence2": rows[i // 2][0], "score": i % 5}
                for i, (q, _) in enumerate(rows)],
    }
    for kind, part in made.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    test = folder / "little" / "test"
    test.mkdir(parents=True)
    (test / "corpus.jsonl").write_text("".join(
        json.dumps({"id": str(i), "text": p}) + "\n" for i, (_, p) in enumerate(rows[:20])))
    (test / "queries.jsonl").write_text("".join(
        json.dumps({"id": str(i), "text": q}) + "\n" for i, (q, _) in enumerate(rows[:20])))
    (test / "qrels.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(20)))
    for stage, before in zip(train.STAGES, (None, *train.STAGES)):
        text = f'stage = "{stage}"\n{STAGE}'
        text += f'previous = {str(folder / f"{before}.py")!r}\n' if before else ""
        (folder / f"{stage}.py").write_text(text)
    return folder


def arguments(files, stage, out, *more):
    kinds = ("text", "pairs", "retrieval", "classification", "sts")
    return [str(files / f"{stage}.py"), f"--out={out}", *SMALL,
            *(f"--{kind}={files / kind}.jsonl" for kind in kinds),
            f"--evaluate={files / 'little' / 'test'}", *more]


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))       # the caches go to out/cache
    yield
    os.chdir(before)


def config(files, stage, out, *more):
    return train.load_config(train.TrainConfig, arguments(files, stage, out, *more))


def run(files, stage, out, *more):
    train.main(arguments(files, stage, out, *more))
    return log(out, stage)


def log(out, stage):
    lines = [json.loads(line) for line in open(Path(out) / stage / "log.jsonl")]
    drop = {"tokens_per_second", "data_share"}
    return {line["step"]: {k: v for k, v in line.items() if k not in drop} for line in lines}


def weights(out, stage):
    return checkpoint.load(checkpoint.latest(Path(out) / stage), "model.pt")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """One undisturbed run of all four stages, started by asking for the last one."""
    out = tmp_path_factory.mktemp("whole")
    run(files, "embed_sup", out)
    return out


def test_asking_for_the_last_stage_trains_all_four(whole, capsys, files):
    for stage in train.STAGES:
        assert sorted(log(whole, stage)) == [1, 2, 3, 4, 5, 6]
        scores = json.loads((whole / stage / "eval.json").read_text())
        assert 0 <= scores["retrieval/little/test/ndcg@10"] <= 1
    tasks = {line["task"] for line in log(whole, "embed_sup").values()}
    assert len(tasks) > 1
    stamp = {s: (whole / s / "log.jsonl").stat().st_mtime_ns for s in train.STAGES}
    run(files, "embed_sup", whole)                 # a finished stage is not repeated
    assert stamp == {s: (whole / s / "log.jsonl").stat().st_mtime_ns for s in train.STAGES}
    shown = capsys.readouterr().out
    assert "embed_weak" in shown and "python embed.py --checkpoint" in shown


def test_the_mask_opens_in_the_weak_stage_only(whole):
    alphas = {s: [line["alpha"] for line in log(whole, s).values()] for s in train.STAGES}
    assert set(alphas["pretrain"]) == set(alphas["sft"]) == {0.0}
    assert alphas["embed_weak"] == [i / 5 for i in range(6)]        # 0 at first, 1 exactly at last
    assert set(alphas["embed_sup"]) == {1.0}
    meta = json.loads(checkpoint.load(checkpoint.latest(whole / "sft"), "config.json"))
    assert meta["mask"]["alpha"] == 0.0


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_run_killed_and_resumed_equals_the_undisturbed_one(files, whole, tmp_path, stage):
    """The field's bugs: replayed data, fresh optimizer state, a forgotten pool."""
    for before in train.STAGES[:train.STAGES.index(stage)]:
        (tmp_path / before).symlink_to(whole / before)
    (tmp_path / "tokenizer.tiktoken").write_bytes((whole / "tokenizer.tiktoken").read_bytes())
    cfg = config(files, stage, tmp_path, "--save_every=2")
    args = arguments(files, stage, tmp_path, "--save_every=2")
    real, count = train.stage_loss, [0]

    def dies(*given, **more):
        count[0] += 1
        if count[0] == 4:                          # after the checkpoint of step 2
            raise KeyboardInterrupt
        return real(*given, **more)

    train.stage_loss = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg, args, train.distributed.start("cpu"))
    finally:
        train.stage_loss = real
    torch.manual_seed(12345)                       # whatever happens in between must not matter
    resumed = run(files, stage, tmp_path, "--save_every=2")
    assert resumed == log(whole, stage)
    expected = weights(whole, stage)
    for name, value in weights(tmp_path, stage).items():
        assert torch.equal(value, expected[name]), name


def test_micro_batches_change_nothing_but_the_memory(files, whole, tmp_path):
    (tmp_path / "tokenizer.tiktoken").write_bytes((whole / "tokenizer.tiktoken").read_bytes())
    for before in train.STAGES[:3]:
        (tmp_path / before).symlink_to(whole / before)
    parts = run(files, "embed_sup", tmp_path, "--micro_batch_size=5")
    for step, line in log(whole, "embed_sup").items():
        assert parts[step]["loss"] == pytest.approx(line["loss"], rel=2e-4)


def test_the_loss_falls(files, tmp_path):
    lines = run(files, "embed_weak", tmp_path, "--previous=", "--steps=40", "--learning_rate=0.01")
    assert lines[40]["loss"] < 0.6 * lines[1]["loss"]


def test_sigterm_saves_and_says_so(files, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"),
               *arguments(files, "pretrain", tmp_path, "--steps=100000", "--save_every=100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    path = tmp_path / "pretrain" / "log.jsonl"
    while time.time() < deadline and not (path.is_file() and path.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in out
    step = int(checkpoint.latest(tmp_path / "pretrain").name.split("_")[1])
    assert step == max(log(tmp_path, "pretrain"))


def test_non_finite_losses_are_skipped_and_then_stop_the_run(files, tmp_path, monkeypatch):
    real, batches = train.stage_loss, {}
    bad = {2, 3}

    def poisoned(model, batch, cfg, step, no_sync):
        batches[step] = batch
        loss, *rest = real(model, batch, cfg, step, no_sync)
        return (loss * float("nan") if step in bad else loss, *rest)

    monkeypatch.setattr(train, "stage_loss", poisoned)
    lines = run(files, "pretrain", tmp_path / "a")
    assert lines[6]["skipped"] == 2
    saved = torch.load(tmp_path / "a/pretrain/nonfinite_step2_rank0.pt", weights_only=True)
    assert saved["task"] == "text" and len(saved["ids"]) == sum(saved["lengths"])
    again = train.data.Batch(**saved)              # the step can be taken once more
    cfg = config(files, "pretrain", tmp_path)
    model = train.Conan(cfg.model_config()).init_weights()
    loss, *_ = real(model, again, cfg, 2)
    first, *_ = real(model, batches[2], cfg, 2)
    assert float(loss) == float(first) > 0
    bad |= set(range(100))
    with pytest.raises(SystemExit, match="step 9, task text: loss nan.*10 such steps in a row"):
        run(files, "pretrain", tmp_path / "b", "--steps=30")


def test_a_save_that_takes_long_warns(files, tmp_path, capsys, monkeypatch):
    run(files, "pretrain", tmp_path / "quick")
    assert "warning: saving" not in "".join(capsys.readouterr())
    monkeypatch.setattr(train, "SLOW_SAVE", 0.0)
    run(files, "pretrain", tmp_path / "slow")
    assert re.search(r"warning: saving .*step_000006 took \d+ s; .* torchrun waits 30 s",
                     "".join(capsys.readouterr()))


def test_a_run_killed_in_its_evaluation_is_evaluated_when_it_goes_on(files, tmp_path, monkeypatch):
    real = train.evaluate_collection

    def dies(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "evaluate_collection", dies)
    with pytest.raises(KeyboardInterrupt):
        run(files, "pretrain", tmp_path)
    assert checkpoint.latest(tmp_path / "pretrain").name == "step_000006"
    monkeypatch.setattr(train, "evaluate_collection", real)
    lines, trained = log(tmp_path, "pretrain"), weights(tmp_path, "pretrain")
    assert run(files, "pretrain", tmp_path) == lines           # no step is taken again
    assert "retrieval/little/test/ndcg@10" in (tmp_path / "pretrain/eval.json").read_text()
    assert all(torch.equal(w, trained[k]) for k, w in weights(tmp_path, "pretrain").items())


@pytest.mark.parametrize("more, message", [
    (["--lerning_rate=1"], "nearest is 'learning_rate'"),
    (["--steps=two"], "steps takes int"),
    (["--passage_len=65"], "must not exceed block_size 64"),
    (["--dims=16,64"], r"dims \(16, 64\) must lie in 1 .. n_embd 32"),
    (["--n_kv_head=3"], "n_head 4 must be a multiple of n_kv_head 3"),
    (["--task_weights=retrieval:1,cls:2"], "tasks are classification"),
    (["--text=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--train_missing=false"], "run: python train.py .*embed_weak.py"),
    (["--batch_size=65", "--previous="], "64 rows are too few for a batch of 65"),
])
def test_mistakes_are_one_clear_line(files, tmp_path, more, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        train.main(arguments(files, "embed_sup", tmp_path, *more))


def test_a_changed_configuration_does_not_pass_for_the_old_run(files, whole):
    with pytest.raises(SystemExit, match="learning_rate=0.001 there, 0.5 now"):
        train.main(arguments(files, "embed_sup", whole, "--learning_rate=0.5"))
    with pytest.raises(SystemExit, match="n_layer=1 there, 2 now"):
        train.main(arguments(files, "embed_sup", whole, "--n_layer=2"))


def test_the_embedder_reads_what_training_wrote(whole):
    embedder = Embedder(whole / "embed_sup", device="cpu")
    texts = ["sort a list", "", "open a file " * 40, "x"]
    vectors = embedder.encode(texts, batch_size=2)
    assert vectors.shape == (4, 32) and vectors.dtype.name == "float32"
    assert torch.allclose(torch.from_numpy(vectors).norm(dim=1), torch.ones(4))
    one = torch.from_numpy(embedder.encode(texts[0]))
    assert torch.allclose(one, torch.from_numpy(vectors[0]), atol=1e-6)
    short = torch.from_numpy(embedder.encode(texts, truncate_dim=8))
    cut = torch.nn.functional.normalize(torch.from_numpy(vectors)[:, :8], dim=1)
    assert torch.allclose(short, cut, atol=1e-6)
    asked = embedder.encode(["sort"], prompt="Find")
    assert torch.allclose(torch.from_numpy(asked),
                          torch.from_numpy(embedder.encode(["Find: sort"])), atol=1e-6)
    with pytest.raises(TypeError, match="text 1 is a int"):
        embedder.encode(["a", 3])
    with pytest.raises(ValueError, match="truncate_dim 33"):
        embedder.encode(["a"], truncate_dim=33)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Embedder(whole / "nowhere")
