"""A run that is killed, stopped or restarted ends where the undisturbed one does, bit for bit.

Every run here is a real `python train.py` (or torchrun) of its own. KILLS=20 in the environment
kills each stage twenty times over; the default keeps the slow group to minutes.
"""
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from engine import checkpoint
from engine.progress import open_log

ROOT = Path(train.__file__).parent
KILLS = int(os.environ.get("KILLS", 3))
STEPS = 8
WORDS = "sort list tree graph node edge file open read write matrix vector random time".split()
CONFIG = f"""steps = {STEPS}
batch_size = 8
passage_len = 32
query_len = 16
n_negatives = 3
pool_size = 6
n_embd = 32
n_head = 4
n_kv_head = 2
ffn_dim = 48
vocab_size = 400
block_size = 64
dims = (8, 32)
log_every = 1
save_every = 1
remine_every = 3
device = "cpu"
dtype = "float32"
"""
# Runs train.py and dies, as by `kill -9`, at the n-th of the calls that it makes while it trains
# and saves: in a step, between two files of a save, before or after a rename, while pruning.
DEADLY = f"""
import os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import train
left = int(sys.argv.pop(1))
if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or os.environ.get("RANK", "0") != \\
        os.environ.get("DIES", "0"):
    left = 0
def deadly(module, name):
    real = getattr(module, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(module, name, call)
for module, names in (os, "fsync rename open"), (shutil, "rmtree"), (train, "stage_loss lr_at"):
    for name in names.split():
        deadly(module, name)
train.main()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows about pairs of words, a config for each stage, and the deadly launcher."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    pairs = [rng.sample(WORDS, 2) for _ in range(48)]
    rows = [(f"{a} a {b}", f"This function {a}s the {b}, number {i}.")
            for i, (a, b) in enumerate(pairs)]
    made = {
        "text": [{"text": f"{q}. {p}"} for q, p in rows],
        "pairs": [{"input": q, "output": p} for q, p in rows],
        "retrieval": [{"query": q, "pos": [p]} for q, p in rows],
        "sts": [{"sentence1": q, "sentence2": rows[i // 2][0], "score": i % 5}
                for i, (q, _) in enumerate(rows)],
    }
    for kind, part in made.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for stage, before in zip(train.STAGES, (None, *train.STAGES)):
        text = f'stage = "{stage}"\n{CONFIG}'
        text += f"previous = {str(folder / f'{before}.py')!r}\n" if before else ""
        text += "".join(f"{kind} = ({str(folder / f'{kind}.jsonl')!r},)\n" for kind in made)
        (folder / f"{stage}.py").write_text(text)
    (folder / "deadly.py").write_text(DEADLY)
    return folder


def command(files, stage, out, *more, ranks=1, dies=None, launcher=()):
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone",
                                      f"--nproc_per_node={ranks}", *launcher]
    script = [ROOT / "train.py"] if dies is None else [files / "deadly.py", dies]
    return [sys.executable, *torchrun, *map(str, script), str(files / f"{stage}.py"),
            f"--out={out}", *more]


def start(files, stage, out, *more, rank_that_dies=0, **how):
    return subprocess.Popen(
        command(files, stage, out, *more, **how), cwd=files, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DIES": str(rank_that_dies)})


def wait(process, seconds=90):
    """Return what the run printed; one that hangs is killed with all that it has started."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise


def finish(process, code=0):
    shown = wait(process)
    assert process.returncode == code, shown[-3000:]
    return shown


def kill(process):
    """Kill the run and all that it has started; nobody gets to say goodbye."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(out, stage):
    """Return {step: what does not depend on the clock}; each step must stand there once."""
    lines = [json.loads(line) for line in open(Path(out) / stage / "log.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))
    return {line["step"]: {k: v for k, v in line.items()
                           if k not in ("tokens_per_second", "data_share")} for line in lines}


def assert_same_state(a, b, where=""):
    """Compare nested tensors and values bit for bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()       # NaN equals NaN here
        assert same, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(one, other, stage):
    assert losses(one, stage) == losses(other, stage) and len(losses(one, stage)) == STEPS
    found = [checkpoint.latest(Path(out) / stage) for out in (one, other)]
    assert {path.name for path in found} == {f"step_{STEPS:06d}"}
    for name in ("model.pt", "trainer.pt"):        # weights; optimizer, RNG, counters and pools
        assert_same_state(*(checkpoint.load(path, name) for path in found), name)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The undisturbed run of all four stages in one process."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(files, "embed_sup", out))
    return out


@pytest.fixture(scope="module")
def whole_of_two(files, tmp_path_factory):
    """The same on two ranks."""
    out = tmp_path_factory.mktemp("whole_of_two")
    finish(start(files, "embed_sup", out, ranks=2))
    return out


def stages_before(stage, source, out):
    """Give `out` what was there when the stage began."""
    out.mkdir(exist_ok=True)
    (out / "tokenizer.tiktoken").write_bytes((source / "tokenizer.tiktoken").read_bytes())
    for before in train.STAGES[:train.STAGES.index(stage)]:
        (out / before).symlink_to(source / before)
    return out


# ---------------------------------------------------------------- kill -9

def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_been(files, whole, tmp_path):
    out = stages_before("sft", whole, tmp_path)
    finish(start(files, "sft", out, dies=47), code=-signal.SIGKILL)
    assert 0 < len(list((out / "sft").glob("*step_*"))) and not (out / "sft/eval.json").exists()
    finish(start(files, "sft", out))
    assert_same_run(whole, out, "sft")


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_kill_9_at_random_calls_again_and_again(files, whole, tmp_path, stage):
    """Each life ends at a random call; one that gets to the end begins anew elsewhere."""
    rng, killed, number = random.Random(stage), 0, 0
    while killed < KILLS:
        out, number = stages_before(stage, whole, tmp_path / str(number)), number + 1
        while killed < KILLS:
            process = start(files, stage, out, dies=rng.randrange(1, 90))
            shown = wait(process)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, shown[-3000:]
            killed += 1
        finish(start(files, stage, out))
        assert_same_run(whole, out, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_kill_9_at_random_times(files, whole, tmp_path, stage):
    """The clock decides: while it starts, while it trains, while it saves."""
    rng, out = random.Random(f"{stage} again"), stages_before(stage, whole, tmp_path)
    for _ in range(KILLS):
        process, began = start(files, stage, out), time.monotonic()
        path, line = out / stage / "log.jsonl", rng.randrange(STEPS - 2)
        while process.poll() is None and time.monotonic() - began < 60:
            if path.is_file() and path.read_bytes().count(b"\n") > line:
                time.sleep(rng.random() * 0.05)
                break
            time.sleep(0.002)
        kill(process)
    finish(start(files, stage, out))
    assert_same_run(whole, out, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_two_ranks_killed_together(files, whole_of_two, tmp_path, stage):
    rng, out = random.Random(stage), stages_before(stage, whole_of_two, tmp_path)
    for _ in range(max(1, KILLS // 2)):
        process = start(files, stage, out, ranks=2, dies=rng.randrange(5, 60),
                        rank_that_dies=rng.randrange(2))
        wait(process)                              # torchrun ends the rank that is left
        assert process.returncode in (0, 1)
    finish(start(files, stage, out, ranks=2))
    assert_same_run(whole_of_two, out, stage)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_run_finishes(files, whole_of_two, tmp_path):
    out = stages_before("embed_sup", whole_of_two, tmp_path)
    shown = finish(start(files, "embed_sup", out, ranks=2, dies=60,
                         launcher=["--max-restarts=2"]))
    assert "restart" in shown.lower()              # it did die
    assert_same_run(whole_of_two, out, "embed_sup")


# ---------------------------------------------------------------- another number of ranks

@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_a_run_goes_on_with_another_number_of_ranks(files, whole, tmp_path, stage):
    """1 -> 2 -> 1 ranks: the same examples, and the losses of one rank but for rounding."""
    out = stages_before(stage, whole, tmp_path)
    finish(start(files, stage, out, dies=40), code=-signal.SIGKILL)
    wait(start(files, stage, out, ranks=2, dies=45))
    finish(start(files, stage, out))
    want, got = losses(whole, stage), losses(out, stage)
    for step, line in want.items():
        assert got[step]["loss"] == pytest.approx(line["loss"], rel=1e-5), step
        assert got[step]["task"] == line["task"]
        assert got[step]["tokens"] == pytest.approx(line["tokens"], rel=0.2)


# ---------------------------------------------------------------- signals

def wait_for_steps(process, path, steps):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps in {path}; exit code {process.poll()}")


@pytest.mark.slow
def test_sigterm_under_torchrun_saves_at_a_common_step(files, tmp_path):
    more = "--steps=100000", "--save_every=100000"
    process = start(files, "pretrain", tmp_path, *more, ranks=2)
    wait_for_steps(process, tmp_path / "pretrain/log.jsonl", 4)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)            # torchrun hands it to its workers
    shown = wait(process, 60)
    assert time.monotonic() - began < 30 and process.returncode != 0
    assert "the same command goes on" in shown
    where = checkpoint.latest(tmp_path / "pretrain")
    assert int(where.name.split("_")[1]) == max(losses(tmp_path, "pretrain"))


# ---------------------------------------------------------------- one trainer, one log

def test_a_second_trainer_in_the_same_folder_is_refused(files, whole, tmp_path):
    out = stages_before("sft", whole, tmp_path)
    (out / "sft").mkdir()
    with open(out / "sft/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shown = finish(start(files, "sft", out), code=1)
    assert f"{out / 'sft'}: another process is training here" in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in (out / "sft").iterdir()) == [".lock"]


def test_the_lock_ends_with_its_holder(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from engine import checkpoint\n"
            f"with checkpoint.only_writer({str(tmp_path)!r}):\n    print('held', flush=True)\n"
            "    sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process"):
        with checkpoint.only_writer(tmp_path):
            raise AssertionError("not reached")
    holder.kill()
    holder.communicate()
    with checkpoint.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("step, left", [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_a_resumed_log_holds_each_step_once(tmp_path, step, left):
    path, lines = tmp_path / "log.jsonl", [f'{{"step": {i}, "loss": 1.5}}\n' for i in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')      # killed while it wrote
    with open_log(path, step) as file:
        file.write("new\n")
    assert path.read_text() == "".join(lines[:left]) + "new\n"


def test_a_run_started_afresh_does_not_go_on_from_the_old_one(tmp_path):
    for step in (5, 6):
        checkpoint.save(tmp_path, step, {"a.txt": f"old {step}"})
    checkpoint.set_aside(tmp_path)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"a.txt": "new"})
    assert checkpoint.latest(tmp_path).name == "step_000001"
    assert (tmp_path / "step_000006.aside/a.txt").read_text() == "old 6"       # nothing is lost
    checkpoint.set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000001.aside", "step_000005.aside", "step_000006.aside"]
