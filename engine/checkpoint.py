"""Atomic, verified, resumable training state.

    out/<run>/step_000100/model.pt        weights alone: all that an embedder reads
                          trainer.pt      optimizer, counters, pools of hard negatives
                          ...             the tokenizer, the config
                          manifest.json   size and SHA-256 of every file, written last

A save fills `.tmp-step_000100`, syncs every file and renames the directory: whenever the process
is killed or the disk is full, `latest` finds the previous or the new checkpoint, whole. Reading
compares with the manifest first (torch loads a flipped bit silently) and unpickles with
`weights_only=True`, so a hostile file runs no code. One process saves; ranks are the caller's.
`read_model` also takes a folder that tools/export.py wrote.
"""
import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import time
import warnings
from pathlib import Path

import torch

from engine.jsonl import sha256_of, stamp

MANIFEST = "manifest.json"
MODEL_FILES = ("config.json", "model.pt", "tokenizer.tiktoken")       # all but what resumes a run
EXPORTED = "nanoconan.json"        # marks a folder that tools/export.py wrote
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no separator: none leads outside
STEP_NAME = re.compile(r"step_(\d{6,})")


@contextlib.contextmanager
def only_writer(run_dir):
    """Lock `run_dir` for this process; the system unlocks it when the process ends, in any way.

    Two runs in one directory would delete each other's checkpoints. Raises ValueError if another
    process has the lock. Where a file system knows no locks, a warning says so.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "ab") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run_dir}: another process is at work here; wait for its end or "
                             "choose another directory") from None
        except (ImportError, OSError) as error:  # Windows; some network file systems
            warnings.warn(f"{run_dir} cannot be locked ({error}): start one run at a time here",
                          stacklevel=3)
        yield


def set_aside(run_dir):
    """Rename the checkpoints of `run_dir`, so that a run started afresh does not resume them.

    step_000100 becomes step_000100.aside; what had that name is deleted.
    """
    for path in reversed(_checkpoints(run_dir)):
        aside = path.with_name(f"{path.name}.aside")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


class CorruptCheckpoint(ValueError):
    """Say which file of a checkpoint is damaged or refused, and why."""


def save(run_dir, step, files):
    """Write `files` as checkpoint `step`, keep it and the one before, return the path.

    `files` maps names to contents: bytes or str are written as they are, any nesting of tensors and
    plain Python values (`*.pt`) as torch.save does. Raises OSError for a full or read-only disk,
    when older checkpoints stay as they were, and TypeError for what could not be read back.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"step_{step:06d}"
    tmp = run_dir / f".tmp-{final.name}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for stale in run_dir.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        tmp.mkdir()
        entries = {name: _write(tmp / name, value) for name, value in files.items()}
        _write(tmp / MANIFEST, _manifest_text(entries))
        _sync_dir(tmp)
        if final.exists():             # it is damaged: a run saves no step twice
            _delete(final)
        os.rename(tmp, final)
        _sync_dir(run_dir)
    except Exception as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError)):       # the caller's mistake
            raise
        raise OSError(f"cannot save {final}, older checkpoints are untouched: {error}") from error
    _prune(run_dir, final)
    return final


def latest(run_dir, names=None):
    """Return the newest checkpoint of `run_dir` that verifies, or None if there is none at all.

    names: see `verify`. A damaged one is named in a warning and passed over. Raises ValueError if
    all are damaged: better than a run that silently starts over.
    """
    reasons = []
    for path in _checkpoints(run_dir):
        try:
            verify(path, names)
            return path
        except CorruptCheckpoint as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
            reasons.append(str(error))
    if reasons:
        raise ValueError(f"no checkpoint of {run_dir} is whole: " + "; ".join(reasons))
    return None


def verify(path, names=None):
    """Compare every file of the checkpoint `path` with its manifest; names: those files alone.

    Raises: CorruptCheckpoint naming the file and what is wrong with it.
    """
    for name, entry in entries(path).items():
        if names is None or name in names:
            _check(Path(path) / name, entry)


def load(path, name):
    """Return the contents of file `name` of the checkpoint `path`: tensors on the CPU, or bytes.

    Tensors are mapped: the ranks of a host share one copy. Clone what is to be kept, so that the
    file goes when its checkpoint is deleted. Only this file is read and verified. Raises:
    CorruptCheckpoint if it is damaged or holds more than tensors and plain Python values,
    ValueError if the checkpoint has no such file.
    """
    listed = entries(path)
    if name not in listed:
        raise ValueError(f"{path} has no {name}, only {', '.join(listed)}")
    file = Path(path) / name
    _check(file, listed[name])
    if not name.endswith(".pt"):
        return file.read_bytes()
    try:
        return _unpickle(file)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, depending on what the file pretends to be
        raise CorruptCheckpoint(f"{file}: refused: {error}") from None


def _write(path, value):
    with open(path, "xb") as file:
        if isinstance(value, (bytes, str)):
            file.write(value.encode() if isinstance(value, str) else value)
        else:
            try:
                torch.save(value, file)
            except RuntimeError as error:  # torch hides a full disk in "unexpected pos 46 vs 0"
                raise error.__context__ or error
        file.flush()
        os.fsync(file.fileno())
    if path.suffix == ".pt":
        try:
            _unpickle(path)
        except TypeError as error:
            raise TypeError(f"{path.name} could not be read back: {error}") from None
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _unpickle(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # its text recommends weights_only=False: not shown
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "no file of torch.save"
        raise TypeError(f"more than tensors and plain Python values: {what}") from None


def _delete(path):
    """Delete a checkpoint; renamed first, since half of one must not look like one."""
    shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}.old")))


def _prune(run_dir, new):
    """Delete all but `new` and the newest before it; later ones are damaged, and passed over."""
    paths = _checkpoints(run_dir)                      # the newest first
    kept = paths[paths.index(new):][:2]
    for path in [path for path in paths if path not in kept]:
        try:
            _delete(path)
        except OSError as error:
            warnings.warn(f"{new} is saved, but {path} could not be deleted: {error}", stacklevel=3)


def _checkpoints(run_dir):
    """Return the checkpoint directories of `run_dir`, newest first, without a look inside."""
    paths = [path for path in Path(run_dir).glob("step_*") if STEP_NAME.fullmatch(path.name)]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path):
    return int(path.name.removeprefix("step_"))


def _manifest_text(entries):
    return json.dumps({"format": 1, "files": entries}, indent=1, sort_keys=True) + "\n"


def entries(path):
    """Return {file: {"size", "sha256"}} of a checkpoint's manifest, unverified."""
    file = Path(path) / MANIFEST
    try:
        text = file.read_bytes().decode()
        listed = json.loads(text)["files"]
        if text != _manifest_text(listed):  # so that no flipped byte of it goes unseen
            raise ValueError("not as it was written")
        for name, entry in listed.items():
            if not FILE_NAME.fullmatch(name) or entry.keys() != {"size", "sha256"}:
                raise ValueError(f"refused entry {name!r}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file}: no valid manifest: {error}") from error
    return listed


def _check(path, entry):
    """Compare the bytes of a file with its entry in the manifest.

    Where they differ either of the two may be the damaged one, so errors name the manifest as well.
    """
    source = f"by {path.parent / MANIFEST}"
    try:
        if (size := path.stat().st_size) != entry["size"]:
            raise CorruptCheckpoint(f"{path}: {size} bytes, {entry['size']} {source}")
        if _sha256_once(path) != entry["sha256"]:
            raise CorruptCheckpoint(f"{path}: SHA-256 differs from the one {source}")
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: {error.strerror}; it should be there {source}") from error


def _sha256_once(path):
    """Return the SHA-256 of a file; a file that this process has hashed before is not read again.

    A start asks several times, and a full-size checkpoint has 18 GB. Another size or time of
    change tells another content, but not within the same seconds: a young file is always read.
    """
    age = time.time() - path.stat().st_mtime
    return _sha256_at(path.resolve(), *stamp(path)) if age > 10 else sha256_of(path)


@functools.lru_cache(64)
def _sha256_at(path, *_):
    return sha256_of(path)


def _sync_dir(path):
    """Make the names in a directory durable, as the fsync of a file does not."""
    if os.name == "nt":  # has no such call
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- a model in a folder

def read_model(path):
    """Return (folder, config as JSON, weights) of the newest checkpoint, or of an export.

    Every file is compared with its SHA-256 before it is read. Raises FileNotFoundError or
    ValueError with the path.
    """
    where = Path(path)
    if (where / EXPORTED).is_file():
        return where, *_read_exported(where)
    if not ((where / MANIFEST).is_file() and (where / "config.json").is_file()):
        where = latest(path, MODEL_FILES)
    if where is None:
        inside = sorted({str(p.parents[1]) for p in Path(path).glob(f"*/step_*/{MANIFEST}")})
        hint = f" ({', '.join(inside)})" if inside else ""
        raise FileNotFoundError(f"{path}: no checkpoint here; train.py writes them to OUT/STAGE"
                                f"{hint}")
    load(where, "tokenizer.tiktoken")
    return where, load(where, "config.json"), load(where, "model.pt")


def _read_exported(where):
    raw = (where / EXPORTED).read_bytes()
    try:
        for name, sha256 in json.loads(raw)["files"].items():
            if not FILE_NAME.fullmatch(name):       # none leads outside
                raise KeyError(name)
            if sha256_of(where / name) != sha256:
                raise ValueError(f"{where / name}: SHA-256 differs from {EXPORTED}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where / EXPORTED}: not as export.py wrote it: {error!r}") from None
    weights = read_safetensors(where / "model.safetensors")
    return raw, {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def read_safetensors(path):
    """Return {name: tensor} of a file; ValueError by its name if it is damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{path}: to read it, pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: damaged safetensors file: {error!r:.200}") from None
