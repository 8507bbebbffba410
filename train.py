"""Train the four stages of Conan-Embedding-v2: one loop, one config file for each stage.

    stage       data                        loss                    mask           PAPER
    pretrain    text                        next token              causal         Sec. 3.1.1
    sft         pairs, as instruction text  next token              causal         Sec. 3.1.1
    embed_weak  the same pairs              InfoNCE, in-batch       soft, 0 -> 1   Sec. 3.1.2, 3.2
    embed_sup   retrieval, CLR, classes,    InfoNCE + hard          bidirectional  Sec. 3.1.2,
                STS                         negatives, CoSENT; MRL                 3.3, 3.4

    python train.py config/embed_sup.py                         # a laptop: all four stages
    torchrun train.py config/embed_sup.py                       # the same
    torchrun --nproc_per_node=8 train.py config/full/sft.py     # 1.4B, App. A
    python train.py config/embed_sup.py --dhnm=fixed --seed=1 --out=out/fixed

A stage starts from the checkpoint of the stage before it, which is trained first if it is missing.
A stopped stage resumes exactly where it stopped, a killed one at its last checkpoint.
"""
import contextlib
import dataclasses
import gc
import math
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import from_command_line
from embed import Embedder
from engine import budget, checkpoint, distributed, kernels, memory, report, run
from engine.collection import read_ahead, unread
from engine.jsonl import write_object
from engine.microbatch import backward, two_pass
from engine.order import key_of, task_of_step
from engine.tokens import tokenizer_of
from eval import evaluate_stage, lexical_scores, validation_loss
from lora import add_lora, merged_state_dict
from losses import cosent_loss, false_negatives, gather_with_grad, info_nce, matryoshka
from mask import CAUSAL, FULL, MaskSpec, alpha
from model import Conan, ConanConfig
from sample import generate
from tokenizer import Tokenizer
from toy import build as toy

STAGES = ("pretrain", "sft", "embed_weak", "embed_sup")
TASKS = ("retrieval", "clr", "classification", "sts")
GRAD_CLIP = 1.0                    # UNSPECIFIED: the norm that gradients are cut to
VALIDATE_EVERY = 50                # steps between validation losses of stages 1 and 2, at least


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run: the shape is the laptop's, the files of config/ set most others."""
    # --- the run
    stage: Literal["pretrain", "sft", "embed_weak", "embed_sup"] = "embed_sup"
    previous: str = ""             # config file of the stage before; empty: random weights
    out: str = "out"               # the stage writes to OUT/STAGE
    resume: bool = True            # continue an interrupted run of the stage
    seed: int = 0                  # of weights, order and task draw
    # --- data: files of data.py's formats; if none is named, those in the folder `data`
    data: str = "out/installed_docs"         # folder of data files; the default one is built
    text: tuple[str, ...] = ()     # pretraining, and the tokenizer's training text
    pairs: tuple[str, ...] = ()    # sft and embed_weak
    retrieval: tuple[str, ...] = ()        # embed_sup, with DHNM
    clr: tuple[str, ...] = ()              # embed_sup, with DHNM: rows made by tools.translate
    classification: tuple[str, ...] = ()   # embed_sup, with DHNM: labels are passages (Table 11)
    sts: tuple[str, ...] = ()              # embed_sup, CoSENT
    evaluate: tuple[str, ...] = ()         # collections scored at the end; empty: DATA's own
    skip_bad_lines: bool = False   # count bad lines instead of stopping at them
    query_len: int = 48            # tokens of a query or STS sentence; longer ones are cut
    passage_len: int = 64          # of a passage; of a window in stage 1, an example in stage 2
    # --- model (ConanConfig)
    vocab_size: int = 8192
    n_layer: int = 4
    n_head: int = 2                # query heads
    n_kv_head: int = 1             # key/value heads: each serves several query heads (GQA)
    n_embd: int = 128              # width, of an embedding too
    ffn_dim: int = 384             # of SwiGLU
    block_size: int = 1024         # tokens of the longest text
    pooling: Literal["mean", "last"] = "mean"      # of the tokens' states; UNSPECIFIED
    pool_prompt: bool = False      # whether an instruction's tokens are part of the mean
    # --- losses
    temperature: float = 0.05      # of InfoNCE and CoSENT; UNSPECIFIED
    dims: tuple[int, ...] = ()     # MRL dims of embed_sup, besides the full width
    task_weights: dict[str, float] = dataclasses.field(     # shares of rows, as clr:3; Table 11
        default_factory=lambda: {"retrieval": 3.0, "clr": 3.0, "classification": 2.8, "sts": 1.8})
    # --- soft mask (embed_weak; "causal" holds for embed_sup, too)
    schedule: Literal["linear", "accelerating", "decelerating", "hard", "causal"] = "linear"
    mask_axis: Literal["row", "col"] = "row"       # Eq. (4) divides by row, its prose by column
    mask_apply: Literal["weights", "logits"] = "weights"   # logits + log M, or logits * M
    # --- DHNM (embed_sup)
    dhnm: Literal["v2", "fixed"] = "v2"    # Eq. (6), or never replace
    n_negatives: int = 7           # hard negatives of a query
    pool_size: int = 50            # candidates of a query; UNSPECIFIED
    # --- optimisation: AdamW
    lora_rank: int = 0             # train low-rank adapters alone (lora.py); 0: all weights
    steps: int = 100
    batch_size: int = 64           # examples a step, all ranks together
    batch_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # of tasks that differ
    micro_batch_size: int = 0      # texts in one pass, 0: all; the result is the same
    learning_rate: float = 1e-3
    warmup: float = 0.05           # share of the steps
    final_lr: float = 0.1          # share of learning_rate that the cosine falls to; UNSPECIFIED
    weight_decay: float = 0.001
    beta2: float = 0.98            # of AdamW, whose beta1 is 0.9; UNSPECIFIED
    # --- machine
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; weights stay float32
    checkpointing: int = 0         # passes of so many tokens recompute blocks in backward; 0: none
    compile: bool = False          # torch.compile of each block, which needs a C++ compiler
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"  # with torchrun (engine/distributed.py)
    dry_run: bool = False          # print parameters, memory, tokens and FLOPs; train nothing
    log_every: int = 10            # steps between two lines of OUT/STAGE/log.jsonl
    save_every: int = 200          # steps between two checkpoints

    def __post_init__(self):
        run.check_values(self, TASKS)              # raises for a value out of range
        self.model_config()                        # and for an impossible shape

    def model_config(self):
        """Return the shape of the model."""
        return ConanConfig(**{f.name: getattr(self, f.name)
                              for f in dataclasses.fields(ConanConfig) if hasattr(self, f.name)})

    @property
    def uses_folder(self):
        """Whether a run reads the folder `data`: if it names no files of its own."""
        return not any(getattr(self, kind) for kind in data.PARSERS)

    @property
    def run_dir(self):
        """Return the stage's folder."""
        return Path(self.out) / self.stage


# ---------------------------------------------------------------- the centre: one step's loss

def stage_mask(cfg, step):
    """Return the mask of a step: causal, soft (PAPER Fig. 2, weak stage only), bidirectional.

    DEVIATES: tau is the number of the last step, as steps count from 0. So the first weak step has
    alpha 0 and the last one exactly 1. For comparison: "hard" is 1 from the first step on, "causal"
    stays at 0 in stages 3 and 4.
    """
    if cfg.stage in ("pretrain", "sft") or cfg.schedule == "causal":
        return CAUSAL
    if cfg.stage == "embed_sup" or cfg.schedule == "hard":
        return FULL
    return MaskSpec(alpha(step, cfg.steps - 1, cfg.schedule), cfg.mask_axis, cfg.mask_apply)


def embedding_loss(x, batch, temperature, dims):
    """Return (loss, cosines of hard negatives) of a batch's embeddings x (texts, D).

    x has B queries, B positives, B * N hard negatives; for STS all first sentences, then all second
    ones. The cosines are (B, N), N = 0 in stage 3, and None for STS. STS is PAPER Eq. 2, everything
    else Eq. 1; both are averaged over the MRL dims (App. A).
    """
    if batch.scores is not None:
        def sts(left, right):
            cosine = F.cosine_similarity(left, right, dim=-1)               # (B,)
            return cosent_loss(cosine, batch.scores, temperature=temperature), None
        return matryoshka(sts, x.chunk(2), dims)                            # Eq. 2
    b = len(batch.query_ids)
    query, positive, hard = x.split([b, b, len(x) - 2 * b])
    negatives = hard.view(b, -1, x.shape[1])                                # (B, N, D)
    excluded = false_negatives(batch.query_ids, batch.positive_ids, batch.negative_ids,
                               batch.known_ids)                             # (B, M)
    nce = partial(info_nce, excluded=excluded, temperature=temperature)
    return matryoshka(nce, (query, positive, negatives), dims)              # Eq. 1


def step_loss(model, batch, cfg, step):
    """Backpropagate one step's loss; return it and the cosines of `embedding_loss`, or None.

    Texts go through the model in one call, or in chunks of `micro_batch_size` with the same result:
    LM losses add up over chunks, contrastive ones take two passes (engine/microbatch.py).
    """
    mask, chunks = stage_mask(cfg, step), list(batch.chunks(cfg.micro_batch_size))
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)        # ddp: ranks meet once a step
    if batch.targets is not None:                          # stages 1 and 2
        return lm_loss(model, batch, chunks, mask, no_sync), None
    dims = {cfg.n_embd, *(cfg.dims if cfg.stage == "embed_sup" else ())}

    def embed(chunk):
        ids, lengths, _, skip = chunk
        return model(ids, lengths, mask, skip=skip)                         # (texts, D)
    return two_pass(embed, chunks,
                    lambda x: embedding_loss(x, batch, cfg.temperature, dims), no_sync)


def lm_loss(model, batch, chunks, mask, no_sync):
    """Backpropagate the mean next-token loss of all ranks' tokens; return this rank's part.

    That loss is the mean of the parts, as DDP averages gradients over ranks. So a part is the sum
    over this rank's tokens, divided by the ranks' mean count. A chunk's loss is a mean over its own
    tokens: it is multiplied by their share of that count.
    """
    counts = gather_with_grad((batch.targets != -100).sum()[None])          # (W,), of each rank
    total, mean_count = 0.0, max(float(counts.sum()) / len(counts), 1)
    for i, (ids, lengths, targets, _) in enumerate(chunks):
        with no_sync() if i < len(chunks) - 1 else contextlib.nullcontext():
            share = (targets != -100).sum() / mean_count                    # a tensor: no wait
            loss = model(ids, lengths, mask, targets) * share
            backward(loss)
        total += loss.detach()
    return total


def lr_at(step, cfg):
    """Return the learning rate: linear warm-up over `warmup` of the steps, then a cosine.

    The cosine would reach `final_lr` one step after the last, as nanoGPT's.
    """
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.learning_rate * (step + 1) / warm
    x = (step - warm) / max(1, cfg.steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * x))                              # 1 -> 0
    return cfg.learning_rate * (cfg.final_lr + (1 - cfg.final_lr) * cosine)


def build_optimizer(model, cfg):
    """Return AdamW of what is not frozen. UNSPECIFIED: matrices decay, norm weights do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# ---------------------------------------------------------------- starting

def prepare_data(configs):
    """Build the built-in corpus if a run of some stages needs it; other data must exist already."""
    cfg = configs[-1]                              # stages share what they read
    if cfg.uses_folder and Path(cfg.data).name == "installed_docs":
        toy.ensure(cfg.data)
    elif cfg.uses_folder and not Path(cfg.data).is_dir():
        raise ValueError(f"data: there is no folder {cfg.data}; `python -m tools.sets` makes one")
    for path in unread(cfg.data, data.PARSERS) if cfg.uses_folder else ():
        print(f"warning: {path} is not read: no file of data has this name")
    read_ahead(configs)


def build_model(state, weights):
    """Set the state's model, and the model as its ranks train it; weights None: random ones.

    It is built without memory, then filled. Under fsdp it is sharded before: no device ever holds
    all of it.
    """
    cfg, world = state.cfg, state.world
    sharded = cfg.parallel == "fsdp" and world.size > 1
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.device("meta"):
        model = Conan(cfg.model_config(), ops=kernels.pick(world.device, cfg.compile))
    if not sharded:
        model.to_empty(device=world.device)
        model.load_state_dict(weights) if weights else model.init_weights(generator)
        if cfg.lora_rank:
            key = key_of(cfg.seed) ^ (1 + STAGES.index(cfg.stage))     # no stage's A is another's
            add_lora(model, cfg.lora_rank, generator.manual_seed(key))
    model.checkpointing = cfg.checkpointing
    state.wrapped = distributed.parallelize(model, world, cfg.parallel, state.dtype)
    if sharded:
        if weights is None and world.is_main:
            weights = dict(model.fresh_weights(generator))
        distributed.fill(model, world, weights)
    if cfg.compile:
        distributed.compile_blocks(model)
    state.model, state.merge = model, merged_state_dict if cfg.lora_rank else None


def train_tokenizer(cfg):
    """Return the tokenizer of the pretraining text, of the pairs where there is none.

    Raises ValueError if there is neither.
    """
    kind = "text" if data.sources(cfg, "text") else "pairs"
    if not data.sources(cfg, kind):
        raise ValueError("a tokenizer is trained on text, or on pairs: neither is given")
    rows = data.open_rows(data.sources(cfg, kind), kind, skip_bad=cfg.skip_bad_lines)
    return tokenizer_of(rows, cfg.vocab_size, cfg.out, cfg.seed)


def start(cfg, world, own, before):
    """Return the `State` of a stage: resumed from its own checkpoint, else at its first step.

    own, before: the checkpoints of this stage and of the one before it, or None. Weights, tokenizer
    and instructions come from the first that is there; without any, weights are random.
    """
    source = own or before
    weights, prompts = None, dict(data.PROMPTS)
    hashes = data.hashes(cfg, world)
    run.check_origin(hashes, before, own)
    if source:
        meta = run.read_meta(source)
        run.check_shape(cfg, meta["model"], source)
        if world.is_main or cfg.parallel != "fsdp":    # which takes the main rank's
            weights = checkpoint.load(source, "model.pt")
        prompts = meta["prompts"]
        tokenizer = Tokenizer.load(source / "tokenizer.tiktoken")
    else:
        tokenizer = world.on_main(lambda: train_tokenizer(cfg))
    # float32, the larger word, if one rank has no fast bfloat16
    dtype = max(world.gather_objects(distributed.choose_dtype(cfg.dtype, world.device)))
    if own and cfg.dtype == "auto":
        dtype = meta.get("dtype", dtype)           # a run keeps its own on another machine
    state = run.State(cfg, world, tokenizer, dtype, hashes, run.weights_hash(before))
    build_model(state, weights)
    state.tasks = data.build_tasks(cfg, tokenizer, world)
    state.prompts = prompts | data.prompts_of(state.tasks)
    last_mask = stage_mask(cfg, cfg.steps - 1)     # of mining and scoring
    state.embedder = Embedder.of(state.model, tokenizer, last_mask, cfg.passage_len, state.prompts,
                                 state.dtype)
    state.optimizer = distributed.shard_optimizer(build_optimizer(state.model, cfg), world,
                                                  cfg.parallel)
    if not cfg.resume:
        world.on_main(lambda: run.set_aside(cfg))      # now that this run can start
    if own:
        run.restore(state, checkpoint.load(own, "trainer.pt"))
    elif cfg.stage == "embed_sup":
        data.fill_pools([task for task, _ in state.tasks], state.whole_embedder())
        if any(task.pool for task, _ in state.tasks):
            run.save(state, 0)                     # mining may have taken longer than many steps
    elif (loss := validation_loss(state)) is not None:
        state.counters |= {"validation_before": loss, "validation": loss}
    return state


# ---------------------------------------------------------------- the loop

def train(cfg, world, before=None):
    """Train one stage to its end and score it; return its checkpoint. before: see `start`."""
    with contextlib.ExitStack() as lock:
        own = world.on_main(lambda: run.claim(cfg, lock))
        state = start(cfg, world, own, before)
        if state.step < cfg.steps:
            world.on_main(lambda: run.scores_aside(cfg))
            own = run_steps(state)
        score(state)
    return own


def take_step(state, task, batch, step, stop):
    """Learn from one batch; return (this rank's numbers, those that all ranks agree on)."""
    cfg, world = state.cfg, state.world
    for group in state.optimizer.param_groups:
        group["lr"] = lr_at(step, cfg)
    with world.autocast(state.dtype):
        loss, cosines = step_loss(state.wrapped, batch, cfg, step)
    state.embedder.mask = stage_mask(cfg, step)            # a checkpoint carries its own
    norm = distributed.whole(torch.nn.utils.clip_grad_norm_(
        state.wrapped.parameters(), GRAD_CLIP))            # over all ranks
    agreed = world.mean({"bad": not math.isfinite(float(loss) + float(norm)),
                         "stop": stop.number, "tokens": len(batch.ids),
                         "truncated": batch.truncated})
    stats = {}
    if agreed["bad"]:
        run.skip_step(state, step, batch, float(loss), float(norm))
    else:
        state.optimizer.step()
        state.counters["in_a_row"] = 0
        if task.pool:              # PAPER Sec. 3.4: negatives of these queries' next visit
            task.pool.update(batch.rows, cosines)
            stats = task.pool.stats()
    distributed.zero_grad(state.wrapped, step == state.step and not cfg.micro_batch_size)
    return {"loss": float(loss), **stats}, agreed | {"grad_norm": float(norm)}


def run_steps(state):
    """Take the steps that are left: log, save, stop cleanly on a signal; return the checkpoint."""
    cfg, world, tasks, counters = state.cfg, state.world, state.tasks, state.counters
    # the task of each step, and which of its batches
    task_at, batch_at = task_of_step(np.arange(cfg.steps), [w for _, w in tasks], cfg.seed)
    if world.is_main and cfg.stage.startswith("embed"):
        report.print_tasks(cfg, tasks)
    stop, log = report.StopSignal(), report.Log(cfg, world, state.step)
    validate_every = max(VALIDATE_EVERY, cfg.steps // 100)
    for step in range(state.step, cfg.steps):
        task, began = tasks[task_at[step]][0], time.perf_counter()
        batch = task.batch(int(batch_at[step])).to(world.device)
        data_seconds = time.perf_counter() - began
        measured, agreed = take_step(state, task, batch, step, stop)
        is_last = step + 1 == cfg.steps
        if "validation" in counters and (is_last or (step + 1) % validate_every == 0):
            counters["validation"] = validation_loss(state)
        for name in ("tokens", "truncated"):
            counters[name] += round(agreed[name] * world.size)
        log.step(step, batch, measured, data_seconds,
                 {"alpha": state.embedder.mask.alpha, "lr": lr_at(step, cfg),
                  "grad_norm": agreed["grad_norm"], **counters})
        if world.device.type == "cpu":
            memory.release_memory()
        if agreed["stop"] or is_last or (step + 1) % cfg.save_every == 0:
            where = run.save(state, step + 1)
        # the last save may have taken long, so ask again
        if agreed["stop"] or is_last and world.mean({"stop": stop.number})["stop"]:
            raise run.Interrupted(stop.number or signal.SIGTERM)
    log.close(counters["truncated"])
    stop.restore()
    return where


# ---------------------------------------------------------------- what a stage is worth

def score(state):
    """Score a stage and write OUT/STAGE/eval.json; let a language model write a few words."""
    cfg, results = state.cfg, evaluate_stage(state)
    if cfg.stage in ("pretrain", "sft") and state.world.is_main and cfg.parallel != "fsdp":
        prompt = "Return the" if cfg.stage == "pretrain" else \
            data.format_sft(state.prompts["retrieval"], "Return the sum of two numbers.")
        text = generate(state.model, state.tokenizer, prompt)
        print(f"\n{cfg.stage} writes: {prompt!r} -> {text!r}\n")
    state.world.on_main(lambda: write_object(cfg.run_dir / "eval.json", results))


def train_chain(configs, world):
    """Train the stages that are not finished, in order; print what all of them scored."""
    cfg, began = configs[-1], time.perf_counter()
    world.on_main(lambda: prepare_data(configs))
    hashes = {}
    for stage in configs:                  # a mistake shows now, not after the stages before it
        hashes[stage.stage] = data.hashes(stage, world)
        world.on_main(lambda: run.finished(stage))
    last, trained = None, False            # the last stage's checkpoint; whether any was trained
    for stage in configs:
        if data.hashes(stage, world) != hashes[stage.stage]:
            raise ValueError(f"the data of {stage.stage} has changed since the start")
        ready = run.reusable(stage, world, hashes[stage.stage], last)
        last, trained = ready or train(stage, world, last), trained or not ready
        gc.collect()                               # else a card may hold two stages at a time
    bm25 = {"BM25": world.on_main(lambda: lexical_scores(cfg))} if cfg.uses_folder else {}
    if world.is_main:
        report.summarise(cfg, STAGES, bm25, (time.perf_counter() - began) / 60, trained)


def main(argv=None):
    """Train the stage that the command line asks for, and before it the stages that are missing."""
    configs = from_command_line(partial(run.chain, TrainConfig), argv)
    cfg = configs[-1]
    if cfg.dry_run:
        with torch.device("meta"):                 # shapes without memory
            model = Conan(cfg.model_config())
        return print(budget.report(cfg, add_lora(model, cfg.lora_rank) if cfg.lora_rank else model))
    run.session(cfg, partial(train_chain, configs))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:                          # in mining or scoring; a step saves first
        sys.exit("train.py: stopped; the same command resumes"
                 + (", without --resume=false" if "--resume=false" in sys.argv else ""))
