"""A run that is killed, stopped or restarted ends where the undisturbed one does, bit for bit.

    pytest -m slow tests/engine/test_kill.py --record=results/trust.json   # all kills, minutes

Runs are `python train.py` or torchrun, or, where there are many, forks of the test that call
train.main: they have torch already.
"""
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import train
from engine import checkpoint
from ranks import (ROOT, STEPS, assert_same_run, chain_arguments, free_port, log,
                   needs_no_gpu, stages_before)

KILLS = 20                             # of each stage, by the slow group
EVERY = "--save_every=1"
# Runs train.py and dies at the n-th of the calls that `deadly` counts, in its first life only.
DEADLY = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/engine")!r}]
import train
from test_kill import deadly
left = int(sys.argv.pop(1))
if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK") == "1":
    deadly(left, os.devnull)
train.main()
"""


SAVING = ("fsync", "rename", "open", "rmtree")     # calls of a save, of those that `deadly` counts


def deadly(left, epitaph):
    """Make this process die, as by `kill -9`, at the `left`-th of some calls; leave its name.

    They are those of a training step and of a save: in a step, between two files, before or after
    a rename, while pruning.
    """
    def wrap(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                Path(epitaph).write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(module, name, call)
    for module, names in (os, "fsync rename open"), (shutil, "rmtree"), (train, "step_loss lr_at"):
        for name in names.split():
            wrap(module, name)


def start(rows, stage, out, *more, ranks=1, dies=None, launcher=()):
    """Start a process of its own, or torchrun; with `dies` rank 1 dies in its first life."""
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone",
                                      f"--nproc_per_node={ranks}", *launcher]
    (rows / "deadly.py").write_text(DEADLY)
    script = [ROOT / "train.py"] if dies is None else [rows / "deadly.py", dies]
    argv = chain_arguments(rows, stage, out, EVERY, *more)
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, script), *argv], cwd=rows, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def live(rows, stage, out, *more, dies=0, rank=0, size=1, port=0):
    """Start a fork that trains a stage, perhaps as one of many ranks; return its process id."""
    needs_no_gpu()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(rows)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())     # the one that forks share stays held by a killed one
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        if dies:
            deadly(dies, out / "epitaph")
        train.main(chain_arguments(rows, stage, out, EVERY, *more))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(pids, seconds=100):
    """Return the exit codes of forks; where one has died the others are not waited for long."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + 20) if codes[pid] else until
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def live_on(size, rows, stage, out, *more, dies=0, victim=0):
    """Run a stage on `size` forks; return their exit codes."""
    port = free_port()
    return end([live(rows, stage, out, *more, dies=dies if rank == victim else 0, rank=rank,
                     size=size, port=port) for rank in range(size)])


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


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """The undisturbed run of all four stages in one process."""
    out = tmp_path_factory.mktemp("whole")
    assert live_on(1, rows, "embed_sup", out) == [0]
    return out


@pytest.fixture(scope="module")
def pretrained_by_two(rows, tmp_path_factory):
    """The undisturbed first stage on two ranks."""
    out = tmp_path_factory.mktemp("pretrained_by_two")
    assert live_on(2, rows, "pretrain", out) == [0, 0]
    return out


@pytest.fixture(scope="module")
def whole_of_two(rows, tmp_path_factory):
    """The undisturbed run of all four stages on two ranks."""
    out = tmp_path_factory.mktemp("whole_of_two")
    assert live_on(2, rows, "embed_sup", out) == [0, 0]
    return out


# ---------------------------------------------------------------- kill -9

def test_a_run_killed_in_a_save_resumes_as_if_nothing_had_been(rows, whole, tmp_path):
    out = stages_before("sft", whole, tmp_path)
    assert live_on(1, rows, "sft", out, dies=50) == [-signal.SIGKILL]
    assert (out / "epitaph").read_text() in SAVING
    assert 0 < len(list((out / "sft").glob("*step_*"))) and not (out / "sft/eval.json").exists()
    assert live_on(1, rows, "sft", out) == [0]
    assert_same_run(whole, out, "sft")


def test_two_ranks_killed_in_a_step_and_in_a_save(rows, pretrained_by_two, tmp_path):
    out = stages_before("pretrain", pretrained_by_two, tmp_path)
    for dies, victim in ((6, 1), (40, 0)):         # rank 1 only steps; rank 0 saves as well
        codes = live_on(2, rows, "pretrain", out, dies=dies, victim=victim)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim]
        assert ((out / "epitaph").read_text() in SAVING) == (victim == 0)
    assert live_on(2, rows, "pretrain", out) == [0, 0]
    assert_same_run(pretrained_by_two, out, "pretrain")


def note(record, name, out):
    """Count a kill for `--record`: in which call it came, if it was one that counts."""
    path, kills = out / "epitaph", record.setdefault(name, {"kills": 0, "in a save": 0})
    kills["kills"] += 1
    if path.exists():
        kills["in a save"] += path.read_text() in SAVING
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_kill_9_at_random_calls_again_and_again(rows, whole, tmp_path, stage, record):
    """Each life ends at a random call; one that gets to the end begins anew elsewhere."""
    rng, killed, number = random.Random(stage), 0, 0
    while killed < KILLS:
        out, number = stages_before(stage, whole, tmp_path / str(number)), number + 1
        while killed < KILLS:
            code, = live_on(1, rows, stage, out, dies=rng.randrange(1, 60))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
            note(record, f"kill -9 at random calls, {stage}", out)
        assert live_on(1, rows, stage, out) == [0]
        assert_same_run(whole, out, stage)
    record[f"kill -9 at random calls, {stage}"]["runs equal bit for bit"] = number


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_kill_9_at_random_times(rows, whole, tmp_path, stage, record):
    """The clock decides: while it starts, while it trains, while it saves."""
    rng, killed, number = random.Random(f"{stage} again"), 0, 0
    while killed < KILLS:
        out, number = stages_before(stage, whole, tmp_path / str(number)), number + 1
        path = out / stage / "log.jsonl"
        for line in sorted(rng.sample(range(STEPS - 1), 4)):
            pid, until = live(rows, stage, out), time.monotonic() + 60
            while time.monotonic() < until and not (
                    path.is_file() and path.read_bytes().count(b"\n") > line):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            if end([pid]) == [-signal.SIGKILL]:
                killed += 1
                note(record, f"kill -9 at random times, {stage}", out)
        assert live_on(1, rows, stage, out) == [0]
        assert_same_run(whole, out, stage)
    record[f"kill -9 at random times, {stage}"]["runs equal bit for bit"] = number


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_two_ranks_killed_again_and_again(rows, whole_of_two, tmp_path, stage, record):
    rng, killed, number = random.Random(stage), 0, 0
    while killed < KILLS // 2:
        out, number = stages_before(stage, whole_of_two, tmp_path / str(number)), number + 1
        while killed < KILLS // 2:
            victim = rng.randrange(2)              # rank 1 takes steps only: fewer calls to die in
            codes = live_on(2, rows, stage, out, victim=victim,
                            dies=rng.randrange(1, 60 if victim == 0 else 20))
            if codes == [0, 0]:
                break
            assert codes[victim] == -signal.SIGKILL
            killed += 1
            note(record, f"kill -9, two ranks, {stage}", out)
        assert live_on(2, rows, stage, out) == [0, 0]
        assert_same_run(whole_of_two, out, stage)
    record[f"kill -9, two ranks, {stage}"]["runs equal bit for bit"] = number


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_run_finishes(rows, pretrained_by_two, tmp_path):
    out = stages_before("pretrain", pretrained_by_two, tmp_path)
    shown = finish(start(rows, "pretrain", out, ranks=2, dies=9, launcher=["--max-restarts=2"]))
    assert "restart" in shown.lower()              # it did die
    assert_same_run(pretrained_by_two, out, "pretrain")


# ---------------------------------------------------------------- signals

def wait_for_steps(process, path, steps):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps in {path}; exit code {process.poll()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])    # SIGHUP: a closed terminal
def test_a_signal_under_torchrun_saves_at_a_common_step(rows, tmp_path, number):
    more = "--steps=100000", "--save_every=100000"
    process = start(rows, "pretrain", tmp_path, *more, ranks=2)
    wait_for_steps(process, tmp_path / "pretrain/log.jsonl", 4)
    began = time.monotonic()
    process.send_signal(number)                    # torchrun hands it to its workers
    shown = wait(process, 60)
    assert time.monotonic() - began < 30 and process.returncode != 0
    assert "the same command resumes" in shown
    where = checkpoint.latest(tmp_path / "pretrain")
    assert int(where.name.split("_")[1]) == max(log(tmp_path, "pretrain"))


# ---------------------------------------------------------------- one trainer, one log

def test_a_second_trainer_in_the_same_folder_is_refused(rows, tmp_path):
    (tmp_path / "pretrain").mkdir()
    with open(tmp_path / "pretrain/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=f"{tmp_path / 'pretrain'}: another process is at"):
            train.main(chain_arguments(rows, "pretrain", tmp_path))
    assert [path.name for path in (tmp_path / "pretrain").iterdir()] == [".lock"]


def test_a_second_trainer_of_two_ranks_is_refused_and_does_not_hang(rows, pretrained_by_two,
                                                                    tmp_path):
    out = stages_before("pretrain", pretrained_by_two, tmp_path)
    (out / "pretrain").mkdir()
    with open(out / "pretrain/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        codes = live_on(2, rows, "pretrain", out)
    assert 0 not in codes and -signal.SIGKILL not in codes     # rank 1 has nobody to meet
    assert live_on(2, rows, "pretrain", out) == [0, 0]        # one rank holds it, not both


def test_the_lock_ends_with_its_holder(tmp_path):
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with checkpoint.only_writer(tmp_path):
            os.write(writer, b"locked")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(ValueError, match="another process"):
        with checkpoint.only_writer(tmp_path):
            raise AssertionError("not reached")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with checkpoint.only_writer(tmp_path):
        pass


def test_a_run_started_afresh_does_not_resume_the_old_one(tmp_path):
    for step in (5, 6):
        checkpoint.save(tmp_path, step, {"a.txt": f"old {step}"})
    checkpoint.set_aside(tmp_path)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"a.txt": "new"})
    assert checkpoint.latest(tmp_path).name == "step_000001"
    assert (tmp_path / "step_000006.aside/a.txt").read_text() == "old 6"       # nothing is lost
    checkpoint.set_aside(tmp_path)
    checkpoint.save(tmp_path, 1, {"a.txt": "newer"})       # afresh again, to the same step
    checkpoint.set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000001.aside", "step_000005.aside", "step_000006.aside"]
    assert (tmp_path / "step_000001.aside/a.txt").read_text() == "newer"
