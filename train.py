"""Train the four stages of Conan-Embedding-v2: one loop, one config file for each stage.

    stage       data                        loss                    mask           PAPER
    pretrain    text                        next token              causal         Sec. 3.1.1
    sft         pairs, as instruction text  next token              causal         Sec. 3.1.1
    embed_weak  the same pairs              InfoNCE, in-batch       soft, 0 -> 1   Sec. 3.1.2, 3.2
    embed_sup   retrieval, CLR, classes,    InfoNCE + 7 negatives,  bidirectional  Sec. 3.1.2,
                STS                         CoSENT; MRL, DHNM                      3.3, 3.4

    python train.py config/embed_sup.py                         # a laptop: all four, ten minutes
    torchrun train.py config/embed_sup.py                       # the same
    torchrun --nproc_per_node=8 train.py config/full/sft.py     # 1.4B, App. A
    python train.py config/embed_sup.py --dhnm=fixed --seed=1 --out=out/fixed

A stage starts from the checkpoint of the stage before it, which is trained first if it is missing
(at full size that is an error naming the command). An interrupted stage goes on where it was.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
from tools import sets
from align import aligned, translation_matrix
from configurator import load_config, split_args
from embed import Embedder
from engine import budget, checkpoint, distributed
from engine.progress import Log, StopSignal
from eval import evaluate_collection
from tasks import LexicalBaseline
from lora import add_lora, lora_state_dict, merged_state_dict
from losses import cached_backward, cosent_loss, info_nce, matryoshka
from mask import MaskSpec, alpha
from mixture import (build_tasks, ensure_files, fill_pools, load_tokenizer, parallel_sentences,
                     uses_docs)
from model import Conan, ConanConfig

STAGES = ("pretrain", "sft", "embed_weak", "embed_sup")
RUN_WIDE = {"out", "docs", "root", "text", "pairs", "evaluate", "skip_bad_lines", "vocab_size",
            "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "attention_dim", "block_size",
            "rope_base", "norm_eps", "embed_std", "embed_rank_power", "aligned_start", "pooling",
            "seed", "device", "dtype", "log_every", "keep_last", "checkpointing", "compile",
            "parallel"}
LIMITS = {                         # of settings; those not named here may be all of their type
    **dict.fromkeys(("steps", "batch_size", "log_every", "save_every", "keep_last", "query_len",
                     "passage_len", "n_negatives", "pool_size"), (1, 10 ** 12)),
    **dict.fromkeys(("micro_batch_size", "remine_every", "lora_rank"), (0, 10 ** 12)),
    **dict.fromkeys(("temperature", "sts_temperature"), (1e-4, 1e4)),
    **dict.fromkeys(("warmup", "final_lr"), (0, 1)), "beta2": (0, 1 - 1e-9),
    "learning_rate": (0, 1e3), "weight_decay": (0, 1e3), "grad_clip": (1e-9, 1e9),
    "aligned_start": (0, 1e6), "negative_cap": (0, 1e3), "rope_base": (1, 1e12),
    "norm_eps": (0, 1e6), "embed_std": (1e-6, 1e3), "embed_rank_power": (0, 100),
    "vocab_size": (258, 2 ** 31),
    "seed": (0, 2 ** 62),
}
SLOW_SAVE = 20.0                   # seconds; a save that takes longer warns


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are the laptop's."""
    # --- the run
    stage: Literal["pretrain", "sft", "embed_weak", "embed_sup"] = "embed_sup"
    previous: str = ""             # config file of the stage before; empty: random weights
    train_missing: bool = True     # train the stage before if it has no checkpoint
    out: str = "out"               # the stage writes to OUT/STAGE
    resume: bool = True            # go on where an interrupted run of the stage was
    seed: int = 0                  # of weights, order and task draw
    # --- data: files of data.py's formats; empty: the embedded documentation corpus
    docs: str = "out/installed_docs"         # where the embedded corpus is built
    root: str = ""                 # a folder of public sets: sets.py makes the files, in OUT/sets
    text: tuple[str, ...] = ()     # pretraining, and the tokenizer's training text
    pairs: tuple[str, ...] = ()    # sft and embed_weak
    retrieval: tuple[str, ...] = ()        # embed_sup, with DHNM
    clr: tuple[str, ...] = ()              # embed_sup, with DHNM: rows made by clr.py
    classification: tuple[str, ...] = ()   # embed_sup, with DHNM: labels are the passages
    sts: tuple[str, ...] = ()              # embed_sup, CoSENT
    evaluate: tuple[str, ...] = ()         # collections scored at the end; empty: the test split
    skip_bad_lines: bool = False   # count bad lines instead of stopping at them
    query_len: int = 48            # tokens of a query at most; longer ones are cut and counted
    passage_len: int = 96          # tokens of a passage, of an SFT example, and of `encode`
    # --- model (ConanConfig)
    vocab_size: int = 24_576       # English and 25 other languages (docs/log.md)
    n_layer: int = 1
    n_head: int = 4
    n_kv_head: int = 1
    n_embd: int = 768
    ffn_dim: int = 64
    attention_dim: int = 256       # of all heads together; 0: n_embd
    block_size: int = 1024
    rope_base: float = 10_000.0
    norm_eps: float = 25.0         # with the next two, untrained, a bag of words weighted by IDF:
    embed_std: float = 0.2         # Conan.rank_scale; the customary 1e-5, 0.02 and 0 need several
    embed_rank_power: float = 4.0  # times the steps at this scale (docs/log.md)
    aligned_start: float = 0.0     # weight of its translations in a random vector (align.py)
    pooling: Literal["mean", "last"] = "mean"
    # --- losses
    temperature: float = 0.05      # InfoNCE; 1.0 is the printed formula
    sts_temperature: float = 0.05  # CoSENT
    dims: tuple[int, ...] = ()     # MRL dims of embed_sup; empty: the full width only
    task_weights: dict[str, float] = dataclasses.field(default_factory=lambda: {
        "retrieval": 3.0, "clr": 3.0, "classification": 2.8, "sts": 1.8})  # Table 11, million rows
    file_weights: dict[str, float] = dataclasses.field(default_factory=dict)  # embed_weak: how
                                   # often rows of a file of pairs are drawn, {pattern: times}
    # --- soft mask (embed_weak)
    schedule: Literal["linear", "accelerating", "decelerating", "hard"] = "linear"
    mask_axis: Literal["row", "col"] = "row"
    mask_apply: Literal["weights", "logits"] = "weights"
    # --- DHNM (embed_sup)
    dhnm: Literal["v2", "v1", "fixed"] = "v2"  # Eq. (6), the rule of v1, or never replace
    n_negatives: int = 7           # hard negatives of a query
    pool_size: int = 50            # candidates of a query
    remine_every: int = 0          # refill the pools with the current model; 0: never
    negative_cap: float | None = None  # drop candidates above cap * the positive's score
    # --- optimisation: AdamW
    lora_rank: int = 0             # train low-rank adapters alone (lora.py); 0: all weights
    steps: int = 100
    batch_size: int = 64           # examples a step, all ranks together
    batch_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # of tasks that differ
    micro_batch_size: int = 0      # texts in one pass, 0: all; the result is the same
    learning_rate: float = 1e-3
    warmup: float = 0.05           # share of the steps
    final_lr: float = 0.1          # share of learning_rate that the cosine ends at; UNSPECIFIED
    weight_decay: float = 0.001
    beta2: float = 0.98
    grad_clip: float = 1.0
    # --- machine
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; weights stay float32
    checkpointing: bool = False    # recompute blocks in backward: memory for time
    compile: bool = False          # torch.compile of each block: a minute at the start, then faster
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"  # with torchrun (engine/distributed.py)
    dry_run: bool = False          # print parameters, memory, tokens and FLOPs; train nothing
    tensorboard: bool = False      # numbers to OUT/STAGE/tensorboard as well
    log_every: int = 10
    save_every: int = 200
    keep_last: int = 2             # checkpoints to keep

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie in {low} .. {high}, not {value}")
        if max(self.query_len, self.passage_len) > self.block_size:
            raise ValueError(f"query_len {self.query_len} and passage_len {self.passage_len} must "
                             f"not exceed block_size {self.block_size}")
        if self.lora_rank and self.parallel == "fsdp":
            raise ValueError(f"lora_rank {self.lora_rank} needs parallel ddp or zero1: fsdp's "
                             "bfloat16 shards would round what adapters add to a weight away")
        if any(not 1 <= d <= self.n_embd for d in self.dims):
            raise ValueError(f"dims {self.dims} must lie in 1 .. n_embd {self.n_embd}")
        tasks = {"retrieval", "clr", "classification", "sts"}
        for name, least in (("task_weights", 0), ("batch_sizes", 1)):
            given = getattr(self, name)
            if set(given) - tasks or any(not least <= v < 1e12 for v in given.values()):
                raise ValueError(f"{name} {given}: tasks are {', '.join(sorted(tasks))}, values "
                                 f"at least {least}, and finite")
        if any(not 0 <= v < 1e12 for v in self.file_weights.values()):
            raise ValueError(f"file_weights {self.file_weights}: values must be at least 0, and "
                             "finite")
        self.model_config()                        # raises for a shape that cannot be

    def model_config(self):
        """Return the shape of the model."""
        return ConanConfig(**{f.name: getattr(self, f.name)
                              for f in dataclasses.fields(ConanConfig) if hasattr(self, f.name)})

    @property
    def run_dir(self):
        """Return the stage's folder."""
        return Path(self.out) / self.stage


# ---------------------------------------------------------------- the centre: one step's loss

def stage_mask(cfg, step):
    """Return the mask of a step: causal, soft (PAPER Sec. 3.2, weak stage only), bidirectional.

    The first weak step has alpha 0 and the last one exactly 1; "hard" is 1 from the first on.
    """
    if cfg.stage in ("pretrain", "sft"):
        return MaskSpec(alpha=0.0)
    if cfg.stage == "embed_sup" or cfg.schedule == "hard":
        return MaskSpec(alpha=1.0)
    return MaskSpec(alpha(step, cfg.steps - 1, cfg.schedule), cfg.mask_axis, cfg.mask_apply)


def stage_loss(model, batch, cfg, step, no_sync=contextlib.nullcontext):
    """Backpropagate one step's loss; return (loss, scores of hard negatives or None, stats).

    Texts go through the model in one call, or in chunks of `micro_batch_size` with the same result:
    LM losses add up over chunks, contrastive ones are cached (losses.cached_backward).
    """
    mask = stage_mask(cfg, step)
    chunks = list(batch.chunks(cfg.micro_batch_size))

    if batch.targets is not None:                          # stages 1 and 2: next token
        total, count = 0.0, distributed.mean_over_ranks((batch.targets != -100).sum())
        for i, (ids, lengths, targets) in enumerate(chunks):
            with no_sync() if i < len(chunks) - 1 else contextlib.nullcontext():
                loss = model(ids, lengths, mask, targets)
                loss = loss * (int((targets != -100).sum()) / max(count, 1))
                loss.backward()
            total += loss.detach()
        return total, None, {}

    def loss_of(x):                                        # (texts, D) embeddings
        if batch.scores is not None:                       # PAPER Eq. 2: STS
            cosent = partial(cosent_loss, score=batch.scores, temperature=cfg.sts_temperature)
            return matryoshka(lambda a, b: cosent((a * b).sum(-1)), x.chunk(2), dims)
        b = len(batch.query_ids)
        query, positive, rest = x.split([b, b, len(x) - 2 * b])
        negatives = None
        if batch.negative_ids is not None:                 # absent ones (-1) stay zero, unused
            negatives = x.new_zeros(*batch.negative_ids.shape, x.shape[1])      # (B, N, D)
            negatives[batch.negative_ids >= 0] = rest
        nce = partial(info_nce, temperature=cfg.temperature, query_ids=batch.query_ids,
                      positive_ids=batch.positive_ids, negative_ids=batch.negative_ids,
                      return_stats=True)
        return matryoshka(nce, (query, positive, negatives), dims)              # PAPER Eq. 1

    dims = cfg.dims if cfg.stage == "embed_sup" and cfg.dims else (cfg.n_embd,)
    loss, *rest = cached_backward(lambda chunk: model(chunk[0], chunk[1], mask), chunks, loss_of,
                                  no_sync)
    return (loss, *rest) if rest else (loss, None, {})


def lr_at(step, cfg):
    """Return the learning rate: linear warm-up over `warmup` of the steps, then a cosine."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.learning_rate * (step + 1) / warm
    x = (step - warm) / max(1, cfg.steps - warm)
    return cfg.learning_rate * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(
        math.pi * x)))


def build_optimizer(model, cfg):
    """Return AdamW of what is not frozen; matrices decay, norm weights do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# ---------------------------------------------------------------- starting, saving, going on

class Interrupted(Exception):
    """A SIGTERM or SIGINT arrived; the run has been saved."""


def initial_weights(cfg, argv, world):
    """Return the state dict that a stage starts from, or None for random weights."""
    if not cfg.previous:
        return None
    files, flags = split_args(argv)
    handed = RUN_WIDE | {"lora_rank"} if cfg.stage == "embed_sup" else RUN_WIDE    # 3 and 4 alike
    given = [cfg.previous, *(flag for key, flag in flags.items() if key in handed)]
    before = load_config(TrainConfig, given)
    where = finished(before)
    if where is None:
        command = f"python train.py {cfg.previous} --out={cfg.out}"
        if not cfg.train_missing:
            raise ValueError(f"{before.run_dir}: stage {cfg.stage} starts from stage "
                             f"{before.stage}, which has no finished checkpoint; run: {command}")
        train(before, given, world)
        where = finished(before)
    shape = json.loads(checkpoint.load(where, "config.json"))["model"]
    if shape != dataclasses.asdict(cfg.model_config()):
        raise ValueError(f"{where}: its model is {shape}, this stage asks for "
                         f"{dataclasses.asdict(cfg.model_config())}")
    return load_weights(cfg, world, where)


def aligned_weights(cfg, tokenizer):
    """Return random weights in which tokens that translate each other start close (align.py)."""
    weights = Conan(cfg.model_config()).init_weights().state_dict()
    matrix = translation_matrix(parallel_sentences(cfg, tokenizer), cfg.vocab_size)
    weights["embed_tokens.weight"] = aligned(weights["embed_tokens.weight"], matrix,
                                             cfg.aligned_start)
    return weights


def load_weights(cfg, world, where):
    """Return a checkpoint's state dict; under fsdp on the main rank alone, {} on the others."""
    return checkpoint.load(where, "model.pt") if world.is_main or cfg.parallel != "fsdp" else {}


def build_model(cfg, world, weights, dtype):
    """Return (the model, the model as `world` trains it); weights: a state dict, None: random ones.

    Under fsdp no device ever holds the model: it is built without memory, sharded, then filled.
    """
    shape = cfg.model_config()
    sharded = cfg.parallel == "fsdp" and world.size > 1
    with torch.device("meta") if sharded else contextlib.nullcontext():
        model = Conan(shape)
    if not sharded:
        model.load_state_dict(weights) if weights else model.init_weights()
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank)
        model.to(world.device)
    model.checkpointing = cfg.checkpointing
    wrapped = distributed.parallelize(model, world, cfg.parallel, dtype)
    if sharded and weights is None:
        Conan.skip_constructor(shape)              # one process has drawn these numbers
        distributed.fill(model, world, model.fresh_weights())
    elif sharded:
        distributed.fill(model, world, distributed.from_main(weights, model, world))
    if cfg.compile:
        distributed.compile_blocks(model)
    return model, wrapped


def finished(cfg):
    """Return the checkpoint of a stage that has run to its end, else None."""
    where = checkpoint.latest(cfg.run_dir) if cfg.run_dir.is_dir() else None
    if where is None:
        return None
    meta = json.loads(checkpoint.load(where, "config.json"))
    check_same(cfg, meta["train"], where)
    return where if meta["step"] >= meta["train"]["steps"] else None


FREE = {"out", "docs", "root", "resume", "train_missing", "log_every", "save_every", "keep_last",
        "device", "evaluate", "micro_batch_size",          # what may differ when a run goes on
        "checkpointing", "compile", "parallel", "dry_run", "tensorboard"}


def check_same(cfg, saved, where):
    """Raise ValueError if a checkpoint was made by another configuration, naming the keys."""
    now, default = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, TrainConfig()))
    saved = default | saved        # a setting that is younger than the checkpoint
    other = [f"{k}={saved[k]} there, {now[k]} now" for k in now
             if k not in FREE and saved[k] != now[k]]
    if other:
        raise ValueError(f"{where} was trained with {'; '.join(other)}. Choose another --out, or "
                         "start this stage afresh with --resume=false")


def save(cfg, world, step, model, optimizer, tasks, tokenizer_path, counters):
    """Write a checkpoint: all that a run needs to go on, and all that `Embedder` needs.

    model.pt has plain weights: with adapters in them, which the run itself keeps apart.
    """
    began = time.perf_counter()
    weights = distributed.model_state(model, world)            # all ranks: fsdp gathers them
    state = distributed.optimizer_state(optimizer, world)
    files = {}
    if world.is_main:
        mask = stage_mask(cfg, min(step, cfg.steps - 1))
        files = {
            "model.pt": weights,
            "trainer.pt": {"step": step, "optimizer": state, "counters": counters,
                           "rng": distributed.rng_state(world),
                           "pools": {t.kind: t.pool.state_dict() for t, _ in tasks if t.pool}},
            "tokenizer.tiktoken": tokenizer_path.read_bytes(),
            "config.json": json.dumps({
                "model": dataclasses.asdict(cfg.model_config()), "train": dataclasses.asdict(cfg),
                "mask": dataclasses.asdict(mask), "passage_len": cfg.passage_len, "step": step,
                "prompts": data.PROMPTS, "versions": versions()}, indent=1)}
    if world.is_main and cfg.lora_rank:
        files["trainer.pt"]["unmerged"] = weights
        files |= {"model.pt": merged_state_dict(model), "lora.pt": lora_state_dict(model)}
    path = checkpoint.save(cfg.run_dir, step, files, cfg.keep_last, is_main=world.is_main,
                           gather=world.gather_objects)
    seconds = time.perf_counter() - began
    if world.is_main and seconds > SLOW_SAVE:
        tqdm.write(f"warning: saving {path} took {seconds:.0f} s; after SIGTERM torchrun waits 30 s"
                   " for a step and a save, then kills: what came after the last one would be lost")
    return path


def versions():
    """Return the versions and the git commit that a run was made with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()
    return {"git": commit or None, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


# ---------------------------------------------------------------- the loop

def train(cfg, argv, world):
    """Run one stage to its end (the stage before it first, if need be); return its checkpoint."""
    done = finished(cfg) if cfg.resume else None
    if done and (cfg.run_dir / "eval.json").is_file():     # else killed in its evaluation
        return done
    with checkpoint.only_writer(cfg.run_dir) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            for name in cfg.evaluate:              # a mistake there would show at the very end
                data.load_collection(name)
            if not cfg.resume:
                checkpoint.set_aside(cfg.run_dir)
                (cfg.run_dir / "eval.json").unlink(missing_ok=True)
        return train_stage(cfg, argv, world)


def train_stage(cfg, argv, world):
    """Train one stage, from its last checkpoint on if there is one; return the finished one."""
    world.main_first(lambda: ensure_files(cfg))
    weights = initial_weights(cfg, argv, world)
    dtype = cfg.dtype if cfg.dtype != "auto" else \
        "bfloat16" if distributed.has_fast_bf16(world.device.type) else "float32"
    distributed.seed_everything(cfg.seed)
    tokenizer = load_tokenizer(cfg, world)
    where = checkpoint.latest(cfg.run_dir) if cfg.resume and cfg.run_dir.is_dir() else None
    state = None
    if where:
        check_same(cfg, json.loads(checkpoint.load(where, "config.json"))["train"], where)
        weights = load_weights(cfg, world, where)
        state = checkpoint.load(where, "trainer.pt")
    elif weights is None and cfg.aligned_start:
        weights = aligned_weights(cfg, tokenizer)
    model, wrapped = build_model(cfg, world, weights, dtype)
    tasks = build_tasks(cfg, tokenizer, world)
    embedder = Embedder.of(model, tokenizer, world.device, dtype, MaskSpec(), cfg.passage_len)
    optimizer = distributed.shard_optimizer(build_optimizer(model, cfg), world, cfg.parallel)
    if state:
        for task, _ in tasks:
            task.load_pool(state["pools"].get(task.kind))
    elif cfg.stage == "embed_sup":
        fill_pools([task for task, _ in tasks], embedder)
    step, counters = 0, {"tokens": 0, "truncated": 0, "skipped": 0, "in_a_row": 0}
    if state:
        distributed.load_optimizer_state(optimizer, state["optimizer"])
        step, counters = state["step"], state["counters"]
        if cfg.lora_rank:
            model.load_state_dict(state["unmerged"])
        distributed.set_rng_state(world, state["rng"])
    keep = partial(save, cfg, world, model=model, optimizer=optimizer, tasks=tasks,
                   tokenizer_path=Path(cfg.out) / "tokenizer.tiktoken", counters=counters)
    run_steps(cfg, world, step, wrapped, optimizer, tasks, counters, keep, dtype, embedder)
    done = keep(cfg.steps)
    report_stage(cfg, world, tasks, embedder)
    return done


def run_steps(cfg, world, step, model, optimizer, tasks, counters, keep, dtype, embedder):
    """Take the steps that are left, logging, saving and stopping cleanly on a signal."""
    order = data.task_of_step(np.arange(cfg.steps), [w for _, w in tasks], cfg.seed)
    taken = np.bincount(order[:step], minlength=len(tasks))
    no_sync = distributed.no_sync(model)
    stop = StopSignal()
    log = Log(cfg, world, step)
    log.candidates(tasks)
    for step in range(step, cfg.steps):
        if cfg.remine_every and step and step % cfg.remine_every == 0:
            fill_pools([task for task, _ in tasks], embedder)
        task = tasks[order[step]][0]
        began = time.perf_counter()
        batch = task.batch(int(taken[order[step]])).to(world.device)
        data_seconds = time.perf_counter() - began
        taken[order[step]] += 1
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        with world.autocast(dtype):
            loss, scores, stats = stage_loss(model, batch, cfg, step, no_sync)
        norm = distributed.clip_grad_norm(model, cfg.grad_clip)
        told = world.mean({"bad": not math.isfinite(float(loss) + float(norm)),
                           "stop": stop.raised,        # what one rank met, all act on
                           "tokens": len(batch.ids), "truncated": batch.truncated})
        if told["bad"]:
            skip_step(cfg, world, step, batch, counters, float(loss), float(norm))
        else:
            optimizer.step()
            counters["in_a_row"] = 0
            if task.pool and scores is not None:
                task.pool.update(world.gather(torch.from_numpy(batch.rows)),
                                 world.gather(scores.cpu()))
                stats |= task.pool.stats()
        optimizer.zero_grad(set_to_none=True)
        for name in ("tokens", "truncated"):
            counters[name] += round(told[name] * world.size)
        log.step(step, batch, {"loss": float(loss), **stats}, data_seconds,
                 {"alpha": stage_mask(cfg, step).alpha, "lr": lr_at(step, cfg),
                  "grad_norm": float(norm), **counters})
        if world.device.type == "cpu":
            distributed.release_memory()
        if told["stop"]:
            keep(step + 1)
            raise Interrupted(stop.number or signal.SIGTERM)
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            keep(step + 1)
    log.close()
    stop.restore()


def skip_step(cfg, world, step, batch, counters, loss, norm, most=10):
    """Leave a step with a non-finite loss or gradient out, on all ranks alike; stop after `most`.

    The batch is written to the run's folder, so that the step can be looked at again.
    """
    counters["skipped"] += 1
    counters["in_a_row"] += 1
    path = cfg.run_dir / f"nonfinite_step{step}_rank{world.rank}.pt"
    torch.save(dataclasses.asdict(batch) | {"rows": batch.rows.tolist()}, path)
    text = (f"step {step}, task {batch.task}: loss {loss}, gradient norm {norm}; skipped, the "
            f"batch is in {path}")
    if counters["in_a_row"] >= most:
        raise FloatingPointError(f"{text}; {most} such steps in a row")
    tqdm.write(text)


# ---------------------------------------------------------------- what a stage is worth

def report_stage(cfg, world, tasks, embedder):
    """Score the stage on its collections (all ranks do), write OUT/STAGE/eval.json."""
    embedder.mask = stage_mask(cfg, cfg.steps - 1)
    results = {}
    for name in collections(cfg):
        dims = cfg.dims if cfg.stage == "embed_sup" else ()
        results |= evaluate_collection(embedder, name, dims)
    for task, _ in tasks:
        if task.pool:
            results |= {f"dhnm/{task.kind}/queries_changed_{changes}_times": queries
                        for changes, queries in task.pool.histogram().items()}
    if world.is_main:
        (cfg.run_dir / "eval.json").write_text(json.dumps(results, indent=1) + "\n")


def collections(cfg):
    """Return the folders that a stage is scored on."""
    if cfg.evaluate or not uses_docs(cfg):
        return [Path(name) for name in cfg.evaluate or sets.held_out_collections(cfg.root)]
    return [Path(cfg.docs) / "test", Path(cfg.docs) / "clr_test"]


def summary(cfg, minutes):
    """Print all stages beside BM25, and write the same numbers to OUT/summary.json."""
    found = {}
    if uses_docs(cfg):
        found["BM25"] = evaluate_collection(LexicalBaseline(), Path(cfg.docs) / "test") \
            | evaluate_collection(LexicalBaseline(), Path(cfg.docs) / "clr_test")
    for stage in STAGES:
        path = Path(cfg.out) / stage / "eval.json"
        if path.is_file():
            found[stage] = json.loads(path.read_text())
    keys = sorted({key for results in found.values() for key in results if "/ndcg@10" in key})
    whole = {key.rsplit("/", 1)[0] for key in keys if "-" not in key.split("/")[2]}
    for name in sorted(name for name in whole if not name.split("/")[2].startswith("mean_")):
        print_table(name, found, cfg.dims)
    print_languages(found)
    for key, value in found.get(cfg.stage, {}).items():
        if key.startswith("dhnm/"):
            print(f"{key:<50}{value:>8}")
    (Path(cfg.out) / "summary.json").write_text(json.dumps(
        {"minutes": minutes, "versions": versions(), "cores": os.cpu_count(), "steps": {
            s: json.loads(p.read_text())["train"]["steps"] for s in STAGES for p in
            sorted((Path(cfg.out) / s).glob("step_*/config.json"))}, **found}, indent=1) + "\n")
    print(f"\ncheckpoint: {checkpoint.latest(cfg.run_dir)}   ({minutes:.1f} minutes)")
    if cfg.stage.startswith("embed"):
        where = "" if cfg.run_dir == Path("out/embed_sup") else f" --checkpoint={cfg.run_dir}"
        print(f"search:     python embed.py{where} --query \"how do I compute the determinant of a "
              "matrix\"")


def print_table(name, found, dims, metrics=("ndcg@10", "recall@1", "recall@10")):
    """Print a collection's scores, a row for each stage and for each MRL dim of the last."""
    print(f"\n{name:<40}" + "".join(f"{m:>11}" for m in metrics))
    for label, results in found.items():
        for dim in ["", *(f":{d}" for d in dims if label == "embed_sup")]:
            values = [results.get(f"{name}/{m}{dim}") for m in metrics]
            if None not in values:
                shown = f"{label}, first {dim[1:]} dims" if dim else label
                print(f"{shown:<40}" + "".join(f"{v:>11.3f}" for v in values))


def print_languages(found):
    """Print nDCG@10 for each query language of collections in several (keys "zh-en")."""
    pairs = sorted({key.split("/")[2] for results in found.values() for key in results
                    if key.endswith("/ndcg@10") and "-" in key.split("/")[2]})
    for label, results in found.items() if pairs else ():
        cells = {p: v for p in pairs for k, v in results.items() if k.endswith(f"/{p}/ndcg@10")}
        if cells:
            print(f"\n{label}, nDCG@10 by query language - passage language, mean "
                  f"{sum(cells.values()) / len(cells):.3f}")
            print("  ".join(f"{p} {v:.2f}" for p, v in cells.items()))


def main(argv=None):
    """Train the stage that the command line asks for, and print what came out."""
    given = sys.argv[1:] if argv is None else argv
    cfg = load_config(TrainConfig, argv)
    if cfg.dry_run:
        with torch.device("meta"):                 # shapes without memory
            model = Conan(cfg.model_config())
        return print(budget.report(cfg, add_lora(model, cfg.lora_rank) if cfg.lora_rank else model))
    world, began = distributed.start(cfg.device), time.perf_counter()
    try:
        train(cfg, given, world)
        if world.is_main:
            summary(cfg, (time.perf_counter() - began) / 60)
        code = 0
    except Interrupted as stopped:
        if world.is_main:
            print(f"stopped by a signal and saved in {cfg.out}; the same command goes on")
        code = 128 + int(str(stopped))
    except (ValueError, OSError, FloatingPointError) as error:
        code = f"train.py: error: {error}"
    finally:
        distributed.stop()             # here the error, and the model in its frames, are gone
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
