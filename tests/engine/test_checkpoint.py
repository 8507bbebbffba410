"""Checkpoints: whatever fails, the previous or the new one is found whole; damage is named."""

import builtins
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

import engine.checkpoint as checkpoint
from dhnm import HardNegativePool
from engine.checkpoint import CorruptCheckpoint, latest, load, save, verify
from engine.distributed import World, load_optimizer_state, optimizer_state
from ranks import assert_equal


def state(step):
    """Two small files of every kind of content, different at every step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"embed": torch.randn(5, 3, generator=generator),
               "half": torch.randn(4, generator=generator).to(torch.bfloat16), "step": step}
    trainer = {"optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(step))}},
                             "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "fused": None}]},
               "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
               "pool": {7: [1, 2], "seen": {1, 2}, "empty": torch.zeros(0, 3, dtype=torch.int64)}}
    return {"model.pt": weights, "trainer.pt": trainer, "config.json": f'{{"step": {step}}}',
            "tokens.bin": bytes([0, 255, step % 256])}


def step_of(path):
    """Return the step that a checkpoint holds, after reading all of its files."""
    for name in checkpoint.entries(path):
        load(path, name)
    return load(path, "model.pt")["step"]


def names(run_dir):
    return sorted(path.name for path in Path(run_dir).iterdir())


def write_manifest(path, entries):
    (path / "manifest.json").write_text(checkpoint._manifest_text(entries))


def test_round_trip(tmp_path):
    path = save(tmp_path / "out" / "run", 100, state(100))
    assert path == tmp_path / "out" / "run" / "step_000100" == latest(tmp_path / "out" / "run")
    for name, value in state(100).items():
        wanted = value.encode() if isinstance(value, str) else value
        if name != "trainer.pt":
            assert_equal(load(path, name), wanted)
    trainer = load(str(path), "trainer.pt")
    assert_equal(trainer["optimizer"], state(100)["trainer.pt"]["optimizer"])
    assert_equal(trainer["pool"], state(100)["trainer.pt"]["pool"])
    random.setstate(trainer["rng"]["python"])
    torch.set_rng_state(trainer["rng"]["torch"])


def test_the_format_is_plain_files_and_a_manifest(tmp_path):
    path = save(tmp_path, 1, state(1))
    assert names(tmp_path) == ["step_000001"]
    assert names(path) == ["config.json", "manifest.json", "model.pt", "tokens.bin", "trainer.pt"]
    assert torch.load(path / "model.pt", weights_only=True)["step"] == 1
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(checkpoint.entries(path)) == set(state(1))


def test_nothing_saved_is_none_and_other_names_are_ignored(tmp_path):
    assert latest(tmp_path / "missing") is None
    for name in ("step_12", "step_x", "step_000001.bak", ".tmp-step_000009", "log.txt"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) is None


def test_newest_is_by_number_beyond_six_digits(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step, {"model.pt": {"step": step}})
    assert latest(tmp_path).name == "step_1000000"
    assert names(tmp_path) == ["step_1000000", "step_999999"]          # the one before is kept


def test_the_newest_two_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, state(step))
    assert names(tmp_path) == ["step_000004", "step_000005"]
    save(tmp_path, 2, state(2))            # an older step, saved now, is not its own victim
    assert names(tmp_path) == ["step_000002"]


def test_a_damaged_later_step_goes_before_a_whole_earlier_one(tmp_path):
    for step in (1, 3):
        save(tmp_path, step, state(step))
    (tmp_path / "step_000003" / "model.pt").write_bytes(b"x")
    save(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_saving_a_damaged_step_again_replaces_it(tmp_path):
    (save(tmp_path, 1, state(1)) / "model.pt").write_bytes(b"x")
    save(tmp_path, 1, state(1))
    assert names(tmp_path) == ["step_000001"] and step_of(latest(tmp_path)) == 1


# Faults: every call that touches the disk fails once, in turn.

class Disk:
    """Count the file operations of a save; the one numbered `fail_at` raises."""

    def __init__(self, monkeypatch, fail_at):
        self.count, self.fail_at, self.log = 0, fail_at, []
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"),
                            (os, "unlink"), (os, "open")):
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))
        real_open = builtins.open

        def open_(file, mode="r", *args, **kwargs):
            self.step(f"open {mode}")
            handle = real_open(file, mode, *args, **kwargs)
            return FaultyFile(handle, self) if "x" in mode else handle
        monkeypatch.setattr(checkpoint, "open", open_, raising=False)

    def wrap(self, name, real):
        def call(*args, **kwargs):
            self.step(name)
            return real(*args, **kwargs)
        return call

    def step(self, name):
        self.count += 1
        self.log.append(name)
        if self.count == self.fail_at:
            raise OSError(28, "No space left on device")


class FaultyFile:
    def __init__(self, file, disk):
        self.file, self.disk, self.fileno = file, disk, file.fileno

    def write(self, data):
        self.disk.step("write")
        return self.file.write(data)

    def flush(self):
        self.disk.step("flush")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def small(step, text="new"):
    return {"model.pt": {"step": step}, "config.json": text}


def count_operations(run_dir, step):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, fail_at=0)
        save(run_dir, step, small(step))
    return disk.count, disk.log


def test_a_fault_at_any_operation_leaves_the_previous_or_the_new_one(tmp_path, record):
    origin, run_dir, seen = tmp_path / "origin", tmp_path / "run", set()
    for step in (1, 2):
        save(origin, step, small(step, "previous"))
    (origin / ".tmp-step_000099").mkdir()
    shutil.copytree(origin, run_dir)
    operations, log = count_operations(run_dir, 3)
    assert {"fsync", "rename", "mkdir", "write", "flush", "rmdir", "open xb"} <= set(log)
    published = log.index("rename")
    assert log[:published].count("fsync") == 4 and "fsync" in log[published:]  # 3 files, directory
    assert "".join(log[:published]).count("flushfsync") == 3       # else a small file syncs empty
    for k in range(1, operations + 1):
        where = (k, log[k - 1])
        shutil.rmtree(run_dir)
        shutil.copytree(origin, run_dir)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an old one could not be deleted
            Disk(patch, fail_at=k)
            try:
                save(run_dir, 3, small(3))
                outcome = "saved"
            except OSError as error:
                outcome = "failed"
                assert all(part in str(error) for part in ("step_000003", "untouched",
                                                           "No space left")), where
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged may be in sight
            found = latest(run_dir)
        new = load(found, "config.json") == b"new"
        assert step_of(found) == (3 if new else 2), where
        assert new or outcome == "failed", where
        if outcome == "saved":  # what could not be deleted whole no longer looks like a checkpoint
            for path in run_dir.glob("step_*"):
                verify(path)
        seen.add((outcome, new))
        if k % 4 == 0:  # and the next save tidies up
            save(run_dir, 4, small(4))
            assert step_of(latest(run_dir)) == 4
            assert not [name for name in names(run_dir) if name.startswith(".tmp")]
    record["file operations of a save failed in turn"] = operations
    assert seen == {("failed", False), ("failed", True), ("saved", True)}


def save_for_ever(run_dir, step, pipe):
    while True:
        save(run_dir, step, {"model.pt": {"w": torch.full((30_000,), float(step)), "step": step}})
        os.write(pipe, f"{step} ".encode())
        step += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_at_any_moment(tmp_path):
    rng, reached, began = random.Random(0), 0, time.perf_counter()
    save(tmp_path / "timed", 1, {"model.pt": {"w": torch.zeros(30_000), "step": 1}})
    each = time.perf_counter() - began                     # on this disk, which may be slow
    for _ in range(25):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, reached + 1, writer)
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(rng.uniform(0, 0.02 + 4 * each))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])  # it was still saving
        with open(reader) as pipe:
            reported = [int(step) for step in pipe.read().split()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = latest(tmp_path)
        if found is None:
            assert not reported and reached == 0
            continue
        step = step_of(found)
        assert step >= max(reported, default=reached)  # what was reported as saved is there
        assert torch.equal(load(found, "model.pt")["w"], torch.full((30_000,), float(step)))
        reached = step
    assert reached > 5


# Damage: every kind, at many places, in every file.

def test_every_flipped_byte_is_found_and_named(tmp_path, record):
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    files, rng, flips = names(path), random.Random(0), 0
    for name in files:
        data = (path / name).read_bytes()
        for at in sorted(rng.sample(range(len(data)), min(len(data), 180))):
            bad = bytearray(data)
            bad[at] ^= rng.choice((1, 0x20, 0x80, 0xFF))
            (path / name).write_bytes(bad)
            with pytest.raises(CorruptCheckpoint, match=name if name != "manifest.json" else None):
                verify(path)
            if name.endswith(".pt"):
                with pytest.raises(CorruptCheckpoint, match=name):
                    load(path, name)
            with pytest.warns(UserWarning, match="step_000002"):
                assert latest(tmp_path).name == "step_000001"
            flips += 1
        (path / name).write_bytes(data)
    record["flipped bytes found, and the checkpoint before taken"] = flips
    assert flips >= 500 and latest(tmp_path) == path


def test_truncation_growth_and_deletion_are_found_and_named(tmp_path, record):
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    rng, damages = random.Random(1), 0
    for name in names(path):
        data = (path / name).read_bytes()
        cuts = {0, 1, len(data) - 1} | {rng.randrange(len(data)) for _ in range(40)}
        for bad in [data[:cut] for cut in cuts if cut < len(data)] + [data + b"\n", None]:
            if bad is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(bad)
            with pytest.warns(UserWarning, match=f"step_000002.*{name}"):
                assert latest(tmp_path).name == "step_000001"
            damages += 1
        (path / name).write_bytes(data)
    record["truncated, grown and deleted files found"] = damages
    assert damages > 100 and latest(tmp_path) == path


def test_a_start_reads_what_has_not_changed_once(tmp_path, monkeypatch):
    path, read = save(tmp_path, 1, state(1)), []
    real = checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda file: read.append(file.name) or real(file))
    for file in path.iterdir():
        os.utime(file, (1e9, 1e9))
    assert latest(tmp_path, checkpoint.MODEL_FILES) == path and "trainer.pt" not in read
    for _ in range(2):
        assert latest(tmp_path) == path and load(path, "model.pt")["step"] == 1
    assert sorted(read) == sorted(checkpoint.entries(path))
    (path / "trainer.pt").write_bytes((path / "trainer.pt").read_bytes()[:-1] + b"x")
    assert latest(tmp_path, checkpoint.MODEL_FILES) == path
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="trainer.pt: SHA-256"):
        latest(tmp_path)


def test_all_damaged_is_an_error_that_names_all(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, state(step)) / "model.pt").write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError) as caught:
        latest(tmp_path)
    assert "step_000001" in str(caught.value) and "step_000002" in str(caught.value)


def test_one_file_can_be_read_though_another_is_damaged(tmp_path):
    path = save(tmp_path, 1, state(1))
    (path / "trainer.pt").write_bytes(b"x")
    assert load(path, "model.pt")["step"] == 1
    with pytest.raises(CorruptCheckpoint, match="trainer.pt"):
        load(path, "trainer.pt")
    with pytest.raises(ValueError, match="no scores.pt, only config.json, model.pt"):
        load(path, "scores.pt")


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux says what is mapped")
def test_tensors_are_mapped_until_they_are_copied(tmp_path):
    """So ranks of a host share one copy, and what the optimizer and the pools keep is their own."""
    def is_mapped():
        return "trainer.pt" in Path("/proc/self/maps").read_text()

    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(1000)
    optimizer.step()
    pool = HardNegativePool([[1, 2, 3]] * 4, 2)
    alone = World(0, 1, torch.device("cpu"))
    path = save(tmp_path, 1, {"trainer.pt": {"optimizer": optimizer_state(optimizer, alone),
                                             "pool": pool.state_dict()}})
    assert not is_mapped()
    saved = load(path, "trainer.pt")
    assert is_mapped()
    load_optimizer_state(optimizer, saved["optimizer"])
    pool.load_state_dict(saved["pool"])
    del saved
    assert not is_mapped()
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((1000,), 0.1))
    assert pool.negatives([3]).tolist() == [[1, 2]]


# Hostile files, with a manifest that matches them.

class Bomb:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def reseal(path, name):
    entries = json.loads((path / "manifest.json").read_text())["files"]
    data = (path / name).read_bytes()
    entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(path, entries)


@pytest.mark.parametrize("bare", [False, True], ids=["torch file", "bare pickle"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, bare):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1, state(1))
    if bare:
        (path / "model.pt").write_bytes(pickle.dumps({"w": Bomb()}, protocol=2))
    else:
        torch.save({"w": Bomb()}, path / "model.pt")
    reseal(path, "model.pt")
    verify(path)
    with pytest.raises(CorruptCheckpoint, match="model.pt: refused: .*(plain|save)") as caught:
        load(path, "model.pt")
    assert "weights_only" not in str(caught.value)  # no advice to switch the guard off
    assert not (tmp_path / "hacked").exists()


def test_a_hostile_pickle_beside_the_files_is_never_opened(tmp_path, monkeypatch):
    """torch.distributed.checkpoint unpickles a `.metadata`; here no such file is ever read."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "run", 1, state(1))
    for name in (".metadata", "__0_0.distcp", "pytorch_model.bin", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    assert step_of(latest(tmp_path / "run")) == 1
    with pytest.raises(ValueError, match="has no optimizer.pt"):
        load(path, "optimizer.pt")
    entry = {"size": (path / ".metadata").stat().st_size,
             "sha256": hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()}
    write_manifest(path, checkpoint.entries(path) | {".metadata": entry})
    with pytest.raises(CorruptCheckpoint, match="refused entry '.metadata'"):
        load(path, ".metadata")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\nb",
                                  "a\\b", "x\n"])
def test_a_manifest_that_leads_outside_is_refused(tmp_path, name):
    path = save(tmp_path / "run", 1, {"x": b"1"})
    entry = checkpoint.entries(path)["x"]
    (tmp_path / "run" / "x").write_bytes(b"1")  # what ../x would find
    write_manifest(path, {name: entry})
    for read in (verify, lambda path: load(path, name)):
        with pytest.raises(CorruptCheckpoint, match="manifest.json.*refused entry"):
            read(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '{"files": []}', "\ufeff{}",
                                  '{"files": {"x": 1}}', '{"format": 2, "files": {}}',
                                  "[" * 100_000], ids=lambda text: text[:12])
def test_a_senseless_manifest_is_damage(tmp_path, text):
    path = save(tmp_path, 1, {"x": b"1"})
    (path / "manifest.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="manifest.json"):
        verify(path)


@pytest.mark.parametrize("entry", [1, None, [], ["size", "sha256"], {}, {"size": 1},
                                   {"size": "1", "sha256": "x"}, {"size": 1, "sha256": None}])
def test_a_senseless_entry_is_damage(tmp_path, entry):
    path = save(tmp_path, 1, {"x": b"1"})
    write_manifest(path, {"x": entry})
    with pytest.raises(CorruptCheckpoint):
        verify(path)


# Wrong use and wrong places.

def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    numpy = pytest.importorskip("numpy")
    save(tmp_path, 1, state(1))
    for value in (numpy.zeros(3), numpy.float64(1), Path("x"), frozenset()):
        with pytest.raises(TypeError, match="model.pt could not be read back"):
            save(tmp_path, 2, {"model.pt": {"deep": [value]}})
    with pytest.raises(Exception, match="(?i)pickle"):
        save(tmp_path, 2, {"model.pt": lambda: 0})
    assert names(tmp_path) == ["step_000001"]


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, state(step))

    def refuse(path, *args, **kwargs):
        if "step_000001" in str(path):
            raise OSError(13, "Permission denied", str(path))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="step_000003 is saved, but .*step_000001"):
        save(tmp_path, 3, state(3))
    assert step_of(latest(tmp_path)) == 3


def test_a_run_that_is_half_set_aside_still_ends_with_its_newest(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, small(step))
    real = Path.rename

    def breaks_off(path, target):
        monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        return real(path, target)
    monkeypatch.setattr(Path, "rename", breaks_off)
    with pytest.raises(OSError, match="killed"):
        checkpoint.set_aside(tmp_path)
    assert latest(tmp_path).name == "step_000002"


def test_where_no_locks_are_known_a_warning_says_so(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no locks here")
    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.warns(UserWarning, match=r"cannot be locked \(no locks here\): start one run at a"):
        with checkpoint.only_writer(tmp_path):
            pass
