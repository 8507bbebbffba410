"""How a run starts, stops, resumes and saves, and which settings may differ when it does.

Settings are classified here and nowhere else. A stage's checkpoint holds all that a resumed run
needs, and all that `Embedder` needs: weights, tokenizer, settings, instructions, and the SHA-256 of
every data file. A run whose settings or data have changed is refused by name.
"""
import copy
import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import ConfigError, build, read_settings
from engine import checkpoint, distributed

MODEL = {"vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "block_size",
         "pooling", "pool_prompt"}
DATA = {"data", "text", "pairs", "retrieval", "clr", "classification", "sts"}
PATHS = DATA | {"out", "evaluate", "previous"}                 # left out of an export
MACHINE = {"device", "dtype", "checkpointing", "compile", "parallel"}
SHARED_BY_STAGES = MODEL | DATA | MACHINE | {"out", "evaluate", "skip_bad_lines", "seed",
                                          "log_every", "save_every"}
SHARED_BY_EMBEDDING = {"lora_rank", "schedule", "mask_axis", "mask_apply"}     # stages 3 and 4
MAY_CHANGE_ON_RESUME = PATHS | (MACHINE - {"dtype"}) | {       # data is compared by content
    "resume", "log_every", "save_every", "micro_batch_size", "dry_run"}
LIMITS = {                         # the others may be anything of their type
    **dict.fromkeys(("steps", "batch_size", "log_every", "save_every", "query_len", "passage_len",
                     "n_negatives", "pool_size"), (1, 10 ** 9)),
    **dict.fromkeys(("micro_batch_size", "lora_rank", "checkpointing"), (0, 10 ** 12)),
    "temperature": (1e-4, 1e4), "warmup": (0, 1), "final_lr": (0, 1), "beta2": (0, 1 - 1e-9),
    "learning_rate": (0, 1e3), "weight_decay": (0, 1e3), "vocab_size": (258, 2 ** 31),
    "seed": (0, 2 ** 62)}
SLOW_SAVE = 20.0                   # seconds; a save that takes longer warns


class Interrupted(Exception):
    """A SIGTERM or SIGINT arrived; the run has been saved."""


@dataclass
class State:
    """What a stage trains with: everything that a checkpoint saves, and what it is saved by."""
    cfg: object                    # TrainConfig
    world: object                  # engine.distributed.World
    tokenizer: object
    dtype: str
    hashes: dict                   # {kind: {data file: SHA-256}}
    before: str = ""               # SHA-256 of the weights that the first step started from
    model: object = None           # the model itself
    wrapped: object = None         # the model as its ranks train it
    optimizer: object = None
    tasks: list = field(default_factory=list)      # [(task, weight)]
    embedder: object = None
    merge: object = None           # model -> plain weights, where adapters are trained
    prompts: dict = field(default_factory=dict)
    step: int = 0
    counters: dict = field(default_factory=lambda: {
        "tokens": 0, "truncated": 0, "skipped": 0, "in_a_row": 0})

    def whole_embedder(self):
        """Return the embedder with all weights: under fsdp a copy. All ranks must call."""
        embedder = copy.copy(self.embedder)
        embedder.model = distributed.whole_model(self.model, self.world)
        return embedder


def check_values(cfg, tasks):
    """Raise ValueError for settings whose value cannot be used, alone or together."""
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"{name} must lie in {low} .. {high}, not {getattr(cfg, name)}")
    if max(cfg.query_len, cfg.passage_len) > cfg.block_size:
        raise ValueError(f"query_len {cfg.query_len} and passage_len {cfg.passage_len} must not "
                         f"exceed block_size {cfg.block_size}")
    if cfg.query_len > cfg.passage_len:
        raise ValueError(f"query_len {cfg.query_len} exceeds passage_len {cfg.passage_len}, to "
                         "which search and evaluation cut every text")
    if cfg.lora_rank and cfg.parallel == "fsdp":
        raise ValueError(f"lora_rank {cfg.lora_rank} needs parallel ddp or zero1: fsdp's bfloat16 "
                         "shards would round what adapters add to a weight away")
    if cfg.lora_rank and not cfg.stage.startswith("embed"):
        raise ValueError(f"lora_rank {cfg.lora_rank}: {cfg.stage} trains all weights, adapters are "
                         "for stages 3 and 4")
    if cfg.n_negatives > cfg.pool_size:
        raise ValueError(f"n_negatives {cfg.n_negatives} exceeds pool_size {cfg.pool_size}")
    if any(not 1 <= d <= cfg.n_embd for d in cfg.dims):
        raise ValueError(f"dims {cfg.dims} must lie in 1 .. n_embd {cfg.n_embd}")
    for name, least in (("task_weights", 0), ("batch_sizes", 1)):
        values = getattr(cfg, name)
        if set(values) - set(tasks):
            raise ValueError(f"{name} {values}: tasks are {', '.join(tasks)}")
        if any(not least <= v < 1e12 for v in values.values()):
            raise ValueError(f"{name} {values}: values must be at least {least}, and finite")
    if not any(cfg.task_weights.values()):
        raise ValueError(f"task_weights {cfg.task_weights}: no task is left")


# ---------------------------------------------------------------- the chain of stages

def chain(cls, argv):
    """Return the configs of all stages up to the one that `argv` asks for, the first stage first.

    A stage's config names the config file of the stage before it (`previous`). A shared setting
    that an earlier stage's file makes holds for the later ones: the model's shape is written once.
    Flags, and config files after the first, are handed to the earlier stages where they are shared.
    """
    files = [arg for arg in argv if not arg.startswith("-")]
    stages = [read_settings(cls, argv)]
    if not files and "stage" not in stages[0]:
        raise ConfigError("name the config of a stage, such as config/embed_sup.py, or its --stage")
    seen = files[:1]                               # the file of this stage alone
    handed = read_settings(cls, [arg for arg in argv if arg not in seen])
    while path := stages[0].get("previous", ""):
        if path in seen:
            raise ConfigError(f"{path}: previous leads back to it")
        seen.append(path)
        stages.insert(0, read_settings(cls, [path]))
    shared, configs = {}, []
    for number, values in enumerate(stages, 1):
        if number < len(stages):
            allowed = SHARED_BY_STAGES | (
                SHARED_BY_EMBEDDING if values.get("stage") == "embed_weak" else set())
            values = values | {k: v for k, v in handed.items() if k in allowed}
            shared |= {k: v for k, v in values.items() if k in allowed}
        try:
            configs.append(build(cls, shared | values))
        except ConfigError as error:
            raise ConfigError(f"{values.get('stage', cls.stage)}: {error}") from error
    names = [cfg.stage for cfg in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f"by their previous, the stages are {', '.join(names)}: one comes twice")
    for cfg in configs[1:]:
        check_shape(cfg, dataclasses.asdict(configs[0].model_config()), names[0])
    return configs


def finished(cfg):
    """Return the checkpoint of a stage that has run to its end and was scored, else None.

    Raises ValueError if it was trained with other settings.
    """
    where = checkpoint.latest(cfg.run_dir, checkpoint.MODEL_FILES) if cfg.resume else None
    if where is None:
        return None
    meta = read_meta(where)
    check_settings(cfg, meta["train"], where)
    done = meta["step"] >= meta["train"]["steps"] and (cfg.run_dir / "eval.json").is_file()
    return where if done else None


def reusable(cfg, world, hashes, before):
    """Return the checkpoint of a finished stage, else None; all ranks must call.

    Raises ValueError if it had other settings or data, or started from other weights.
    """
    where = world.on_main(lambda: finished(cfg))
    check_origin(hashes, before, where)
    if where and world.is_main and read_meta(where)["train"]["evaluate"] != list(cfg.evaluate):
        print(f"{where} is scored already; eval.py scores it on other collections")
    return where


def check_origin(hashes, before, where):
    """Raise ValueError if a checkpoint, if there is one, had other data or another stage before."""
    if where is None:
        return
    check_data(hashes, where)
    if read_meta(where).get("before") not in (None, weights_hash(before)):     # None: not noted yet
        raise ValueError(f"{where} started from other weights than {before or 'random ones'} has "
                         "now. Choose another --out, or start this stage afresh with "
                         "--resume=false")


def check_shape(cfg, saved, where):
    """Raise ValueError if a checkpoint's model has another shape; how it pools may change."""
    own = ("pooling", "pool_prompt")
    if other := [f"{name} {saved.get(name)}, {cfg.stage} asks for {value}"
                 for name, value in dataclasses.asdict(cfg.model_config()).items()
                 if name not in own and saved.get(name) != value]:
        raise ConfigError(f"{where}: its model has {'; '.join(other)}")


def read_meta(where):
    """Return the config.json of a checkpoint."""
    return json.loads(checkpoint.load(where, "config.json"))


def check_settings(cfg, saved, where):
    """Raise ValueError if a checkpoint was trained with other settings, naming them."""
    now, default = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, type(cfg)()))
    saved = default | saved        # a setting that is younger than the checkpoint
    other = [f"{k}={saved[k]} there, {now[k]} now" for k in now
             if k not in MAY_CHANGE_ON_RESUME and saved[k] != now[k]]
    if other:
        raise ValueError(f"{where} was trained with {'; '.join(other)}. Choose another --out, or "
                         "start that stage afresh by its own config and --resume=false")


def check_data(hashes, where):
    """Raise ValueError if the content of a data file has changed since a checkpoint, by its name.

    hashes: {kind: {file: SHA-256}}. A file may lie elsewhere now; an edited, shortened, longer or
    reordered one is refused.
    """
    saved = read_meta(where)["data"]
    for kind in hashes | saved:
        now, before = hashes.get(kind, {}), saved.get(kind, {})
        if list(now.values()) == list(before.values()):
            continue
        new = {name for name, sha256 in now.items() if sha256 not in before.values()}
        gone = {name for name, sha256 in before.items() if sha256 not in now.values()}
        what = [f"{', '.join(sorted(names))} {word}" for names, word in (
            (new & gone, "changed"), (new - gone, "new"), (gone - new, "gone")) if names]
        what += [] if now else ["where files are named, the folder --data is not read"]
        raise ValueError(f"{where} was trained on other {kind} data: "
                         f"{'; '.join(what) or 'the order of its files changed'}. Bring the old "
                         "files back, choose another --out, or start this stage afresh with "
                         "--resume=false")


def weights_hash(where):
    """Return the SHA-256 of a checkpoint's weights, "" for random ones (None)."""
    return checkpoint.entries(where)["model.pt"]["sha256"] if where else ""


def claim(cfg, lock):
    """Lock a stage's folder; return the checkpoint to resume.

    lock: an ExitStack that holds the lock.
    """
    lock.enter_context(checkpoint.only_writer(cfg.run_dir))
    if not cfg.resume and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ValueError("torchrun restarts the run, and --resume=false would begin it again; "
                         "start it without that")
    return checkpoint.latest(cfg.run_dir) if cfg.resume else None


def scores_aside(cfg):
    """Rename scores that a stage has before its last step: they are of other weights."""
    if (cfg.run_dir / "eval.json").is_file():
        os.replace(cfg.run_dir / "eval.json", cfg.run_dir / "eval.json.aside")


def set_aside(cfg):
    """Rename what an old run left; what an older one left is deleted.

    The log of a run that has saved no step is not worth an older one's.
    """
    scores_aside(cfg)                              # first: else they could outlive their weights
    steps = [path.name for path in cfg.run_dir.glob("step_*") if not path.suffix]
    if (cfg.run_dir / "log.jsonl").is_file() and max(steps, default="") > "step_000000":
        os.replace(cfg.run_dir / "log.jsonl", cfg.run_dir / "log.jsonl.aside")
    checkpoint.set_aside(cfg.run_dir)


def session(cfg, work):
    """Call work(world) as one of a run's processes; a mistake or a signal ends it with one line."""
    world, code = distributed.ALONE, 0
    try:
        world = distributed.start(cfg.device)
        work(world)
    except Interrupted as stopped:
        if world.is_main:
            print(f"stopped by a signal and saved in {cfg.out}; the same command resumes"
                  + ("" if cfg.resume else ", without --resume=false"))
        code = 128 + stopped.args[0]
    except (ValueError, OSError, FloatingPointError) as error:
        code = f"train.py: error: {error}"
    finally:
        # the traceback no longer holds the model
        distributed.stop(is_orderly=not isinstance(code, str) and sys.exc_info()[0] is None)
    if code:
        sys.exit(code)


# ---------------------------------------------------------------- saving and resuming

def save(state, step):
    """Write a checkpoint of a stage after `step` steps; return its path. All ranks must call.

    model.pt has plain weights: with adapters in them, which the run itself keeps apart.
    """
    cfg, world, began = state.cfg, state.world, time.perf_counter()
    weights = distributed.gather_state(state.model.state_dict(), world)
    optimizer = distributed.optimizer_state(state.optimizer, world)
    pools = {t.kind: t.pool.state_dict() for t, _ in state.tasks if t.pool}

    def write():
        trainer = {"step": step, "optimizer": optimizer, "counters": state.counters,
                   "pools": pools}
        model = weights
        if state.merge:
            trainer["unmerged"], model = weights, state.merge(state.model)
        return checkpoint.save(cfg.run_dir, step, {
            "model.pt": model, "trainer.pt": trainer,
            "tokenizer.tiktoken": state.tokenizer.to_bytes(),
            "config.json": json.dumps(meta_of(state, step), indent=1)})

    path = world.on_main(write)
    seconds = time.perf_counter() - began
    if world.is_main and seconds > SLOW_SAVE:
        tqdm.write(f"warning: saving {path} took {seconds:.0f} s; after SIGTERM torchrun waits 30 s"
                   " for a step and a save, then kills: what came after the last one would be lost."
                   f" From torch 2.13 on it takes --shutdown-timeout={10 * round(seconds)}")
    return path


def meta_of(state, step):
    """Return what config.json says of a checkpoint."""
    cfg = state.cfg
    return {"model": dataclasses.asdict(cfg.model_config()), "train": dataclasses.asdict(cfg),
            "mask": dataclasses.asdict(state.embedder.mask), "passage_len": cfg.passage_len,
            "step": step, "prompts": state.prompts, "data": state.hashes,
            "before": state.before, "dtype": state.dtype, "versions": versions()}


def restore(state, saved):
    """Take over optimizer, counters and pools of a trainer.pt; no step draws a random number."""
    distributed.load_optimizer_state(state.optimizer, saved["optimizer"])
    state.step, state.counters = saved["step"], saved["counters"]
    for task, _ in state.tasks:
        if task.kind in saved["pools"]:
            task.load_pool(saved["pools"][task.kind])
    if state.merge:
        state.model.load_state_dict(saved["unmerged"])


@functools.cache
def versions():
    """Return the versions and the git commit that a run was made with."""
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()        # "" where git is missing
    return {"git": commit or None, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


def skip_step(state, step, batch, loss, norm, most=10):
    """Leave a step with a non-finite loss or gradient out; raise FloatingPointError after `most`.

    The batch is written to the run's folder, so that the step can be looked at again.
    """
    state.counters["skipped"] += 1
    state.counters["in_a_row"] += 1
    path = state.cfg.run_dir / f"nonfinite_step{step}_rank{state.world.rank}.pt"
    place = f"in {path}"
    try:
        torch.save(dataclasses.asdict(batch.to("cpu")) | {"rows": batch.rows.tolist()}, path)
    except (OSError, RuntimeError) as error:           # a full disk; torch's own error is either
        place = f"not kept: {error}"
    text = (f"step {step}, task {batch.task}: loss {loss}, gradient norm {norm}; skipped, the "
            f"batch is {place}")
    if state.counters["in_a_row"] >= most:
        raise FloatingPointError(f"{text}; {most} such steps in a row")
    tqdm.write(text)
