"""Measure speed and memory beside what a user would pick instead; every row has a floor and a goal.

    python -m experiments.bench                              # all that this machine can measure
    python -m experiments.bench --only=encoding,cached       # some again; the others stay
    python -m experiments.bench --device=cpu --rounds=9

Sides of a comparison run in turn, `rounds` times after a warm-up; a row is the median of the paired
ratios, so what else the machine does meets all sides alike. Texts are made-up words of real lengths
(log-normal, mean 61 tokens). Results go to results/bench_cpu.json and results/bench_gpu.json.
Every fast path here is held equal to the plain one by a test. sentence-transformers, transformers
with accelerate, datasets, tokenizers and rustbpe are optional: rows that need one are left out.
"""
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from engine import flash
import data
from tools import export
import train
from configurator import load_config
from dhnm import HardNegativePool
from embed import Embedder
from engine import budget, distributed
from losses import cached_backward, info_nce, lm_cross_entropy
from mask import CAUSAL, FULL, MaskSpec, future_weight
from mixture import Task
from model import Conan, ConanConfig, Packing, attend, attend_packed
from tokenizer import PATTERN, Tokenizer

GOALS = {                              # row: (floor, goal); a goal below the floor: less is better
    **{f"training fixed {dtype}": (0.95, 1.1) for dtype in ("float32", "bfloat16")},
    **{f"training real {dtype}": (2.5, 4.5) for dtype in ("float32", "bfloat16")},
    "training fixed defaults": (1.7, 2.5), "training real defaults": (5.0, 8.0),
    "encoding float32": (1.15, 1.4), "encoding bfloat16": (1.15, 1.4),
    **{f"soft step {t}": (1.15, 1.05) for t in (512, 1024, 2048)},
    "DHNM step": (1.02, 1.0), "data wait share": (0.03, 0.01), "padding share": (0.10, 0.0),
    "cached memory": (1.15, 1.05), "cached time": (1.4, 1.33),
    "head time": (1.25, 1.0), "head memory": (1 / 8, 1 / 14),
    "tokenizer training": (2.0, 2.6), "tokenizer encoding": (4.0, 6.5),
    "LM 2048 share of matmul rate": (0.50, 0.65), "LM 32768 share of matmul rate": (0.40, 0.52),
    "embedding 512 share of matmul rate": (0.45, 0.62),
    "soft attention 32768 time": (2.0, 1.3), "soft attention 32768 memory": (1.2, 1.05),
    "encoding reviews": (4.0, 6.0),
}
MEANS = {                              # what is divided by what
    "training": "pairs/s, over those of sentence-transformers' trainer",
    "encoding": "texts/s, over those of SentenceTransformer.encode",
    "encoding reviews": "texts/s of 60 tokens at 1.4B, over the paper's 649 on its card",
    "soft step": "seconds of a soft-mask step, over the same step bidirectional",
    "soft attention": "two calls of flash attention, over the best bidirectional kernel",
    "DHNM": "seconds a token of a step with DHNM, over the same with fixed negatives",
    "data": "making batches (tokenising, mining look-ups), share of a step",
    "padding": "pads, share of the tokens that attention sees",
    "padded": "seconds of a step on padded texts of real lengths, over packed ones",
    "cached memory": "two passes over 16 chunks, over one pass of one chunk",
    "cached time": "two passes over 16 chunks, over one pass of each",
    "head": "cross-entropy in chunks, over all logits at once",
    "tokenizer": "MB/s, over Hugging Face tokenizers with the same words",
    "LM": "model FLOP/s of a training step, over the matmul rate measured in the same run",
    "embedding": "model FLOP/s of a training step, over the matmul rate measured in the same run",
}


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `python -m experiments.bench`; the shape is that of the CPU rows."""
    rounds: int = 5                # times that each side is measured
    only: tuple[str, ...] = ()     # measurements to take (see MEASURES); empty: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU, and the GPU if there is one
    out: str = "results"           # folder of bench_cpu.json and bench_gpu.json
    pairs: int = 64                # of a step
    steps: int = 3                 # of a trainer in one round
    texts: int = 1000              # to encode
    vocab_size: int = 8192
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 256
    ffn_dim: int = 704
    head_vocab: int = 150_000      # words of the cross-entropy and of the tokenizer
    head_tokens: int = 2048
    tokenizer_mb: float = 60.0     # of installed Python source
    longest: int = 8192            # tokens: attention by length, on the CPU
    soft_lengths: tuple[int, ...] = (512, 1024, 2048)

    def shape(self, **changes):
        """Return the `ConanConfig` of the CPU rows."""
        names = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim")
        return ConanConfig(**{**{n: getattr(self, n) for n in names}, "block_size": 32_768,
                              **changes})


# ---------------------------------------------------------------- how things are measured

def in_turn(sides, rounds, device="cpu"):
    """Return {name: [seconds]} of some callables, called in turn `rounds` times after a warm-up.

    Every other turn goes backwards, as the first of a turn was seen to take 3 % longer. A callable
    that returns a number has measured its seconds itself.
    """
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in list(sides.items())[::-1 if turn % 2 else 1]:
            began = time.perf_counter()
            own = work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:                               # the first turn warms up
                seconds[name].append(own if isinstance(own, float)
                                     else time.perf_counter() - began)
    return seconds


def ratio(above, below):
    """Return the median of the ratios of paired measurements."""
    return statistics.median(a / b for a, b in zip(above, below))


def peak_memory(work, device="cpu"):
    """Return the bytes of tensors that `work` holds at most, beyond what is there before."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()                                     # counted by torch's allocator: exact, unlike RSS
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, *np.cumsum([0, *sizes]).tolist())


def missing(*packages):
    """Tell, and say so, if one of some optional packages is not installed."""
    import importlib.util
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"left out, as {', '.join(lacking)} is not installed (requirements-extras.txt)")
    return bool(lacking)


# ---------------------------------------------------------------- made-up texts of real lengths

@cache
def words():
    """Return made-up words, and a tokenizer that knows each of them as one token."""
    rng = np.random.default_rng(0)
    made = {"".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 9)))
            for _ in range(1200)}
    made = sorted(made)
    return made, Tokenizer.train([" " + " ".join(made)] * 3, 3700)


def make_texts(n, rng, mean=61, longest=256, fixed=None):
    """Return n texts of `fixed` tokens, or of log-normal lengths before the cut at `longest`."""
    known = words()[0]
    draw = rng.lognormal(np.log(mean) - 0.32, 0.8, n)
    lengths = [fixed] * n if fixed else np.clip(draw, 3, longest).astype(int)
    return [" ".join(rng.choice(known, int(k))) for k in lengths]


def random_ids(lengths, vocab_size, device="cpu"):
    """Return random flat ids for texts of these lengths."""
    return torch.randint(0, vocab_size, (sum(lengths),), device=device)


def bench_model(cfg, device="cpu", **changes):
    """Return a `Conan` of the shape of the CPU rows, with fresh weights."""
    return Conan(cfg.shape(**changes)).init_weights(torch.Generator().manual_seed(0)).to(device)


def training_step(model, ids, lengths, mask=FULL, dtype="bfloat16", chunks=1):
    """Run forward, InfoNCE and backward of one batch of pairs; `chunks` > 1: the two-pass step."""
    b, ends = len(lengths) // 2, np.cumsum([0, *lengths])
    cuts = np.linspace(0, len(lengths), chunks + 1).astype(int)
    parts = [(ids[ends[i]:ends[j]], lengths[i:j]) for i, j in zip(cuts, cuts[1:])]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        cached_backward(lambda part: model(*part, mask), parts,
                        lambda x: info_nce(x[:b], x[b:], temperature=0.05)[0])
    model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- against sentence-transformers

def our_trainer(cfg, pairs, longest, dtype):
    """Return a callable: `steps` whole steps, tokenising, both passes, clipping and AdamW."""
    train_cfg = train.TrainConfig(stage="embed_weak", schedule="hard", n_embd=cfg.n_embd,
                                  n_head=cfg.n_head, n_kv_head=cfg.n_kv_head)
    world = distributed.World(0, 1, torch.device("cpu"))
    model, tokenizer = bench_model(cfg), words()[1]
    optimizer = train.build_optimizer(model, train_cfg)

    def run():
        began = time.perf_counter()
        for step in range(cfg.steps):
            part = pairs[step * cfg.pairs:(step + 1) * cfg.pairs]
            texts = [q for q, _ in part] + [p for _, p in part]
            ids = torch.arange(len(part))
            batch = data.Batch.of("pairs", texts, [longest] * len(texts), tokenizer, None,
                                  query_ids=ids, positive_ids=ids)
            with world.autocast(dtype):
                train.stage_loss(model, batch, train_cfg, step)
            distributed.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / cfg.steps
    return run


def exported(cfg, folder, longest):
    """Write a model of the same shape as a directory that sentence-transformers loads."""
    model, tokenizer = bench_model(cfg), words()[1]
    embedder = Embedder.of(model, tokenizer, "cpu", "float32", FULL, longest)
    embedder.checkpoint = Path(folder) / "none" / "step_000000"
    embedder.meta = {"model": dataclasses.asdict(model.config), "mask": dataclasses.asdict(FULL),
                     "passage_len": longest, "prompts": dict.fromkeys(data.PROMPTS, ""), "step": 0,
                     "versions": train.versions(), "train": dataclasses.asdict(
                         train.TrainConfig(stage="embed_weak", n_embd=cfg.n_embd,
                                           n_head=cfg.n_head, n_kv_head=cfg.n_kv_head))}
    path = Path(folder) / f"exported_{longest}"
    path.mkdir()
    export.write(embedder, path, "bench", "llama", False)
    return str(path)


def their_trainer(cfg, pairs, longest, dtype, folder):
    """Return a callable: `steps` steps of SentenceTransformerTrainer, as its manual has it."""
    from datasets import Dataset
    from sentence_transformers import (SentenceTransformer, SentenceTransformerTrainer,
                                       SentenceTransformerTrainingArguments, losses)
    from transformers import TrainerCallback
    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = longest
    rows = Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]})

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    def run():
        times.clear()
        args = SentenceTransformerTrainingArguments(
            output_dir=f"{folder}/run", max_steps=cfg.steps + 1, use_cpu=True,
            per_device_train_batch_size=cfg.pairs, bf16=dtype == "bfloat16", report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            batch_sampler="no_duplicates", dataloader_pin_memory=False)
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=rows, callbacks=[Clock()],
            loss=losses.MultipleNegativesRankingLoss(model)).train()
        return (times[-1] - times[0]) / cfg.steps          # its first step sets things up
    times = []
    return run


def training(cfg, found, name, longest, fixed):
    """Measure training pairs/s in both dtypes; texts of `fixed` words, None: of real lengths."""
    if missing("sentence_transformers", "datasets", "accelerate"):
        return
    rng, n = np.random.default_rng(1), cfg.pairs * (cfg.steps + 1)
    pairs = list(zip(make_texts(n, rng, fixed=fixed), make_texts(n, rng, fixed=fixed)))
    with tempfile.TemporaryDirectory() as folder:
        where = exported(cfg, folder, longest)
        sides = {}
        for dtype in ("float32", "bfloat16"):
            sides["ours", dtype] = our_trainer(cfg, pairs, longest, dtype)
            sides["theirs", dtype] = their_trainer(cfg, pairs, longest, dtype, where)
        seconds = in_turn(sides, cfg.rounds)
    for dtype in ("float32", "bfloat16"):
        found.row(f"training {name} {dtype}",
                  ratio(seconds["theirs", dtype], seconds["ours", dtype]),
                  pairs_per_second=cfg.pairs / statistics.median(seconds["ours", dtype]),
                  theirs=cfg.pairs / statistics.median(seconds["theirs", dtype]))
    found.row(f"training {name} defaults",
              ratio(seconds["theirs", "float32"], seconds["ours", "bfloat16"]))


def encoding(cfg, found):
    """Measure encoding texts/s at real lengths, in both dtypes."""
    if missing("sentence_transformers"):
        return
    from sentence_transformers import SentenceTransformer
    texts = make_texts(cfg.texts, np.random.default_rng(2))
    with tempfile.TemporaryDirectory() as folder:
        where = exported(cfg, folder, 256)
        for dtype in ("float32", "bfloat16"):
            ours = Embedder.of(bench_model(cfg), words()[1], "cpu", dtype, FULL, 256)
            theirs = SentenceTransformer(where, device="cpu",
                                         model_kwargs={"dtype": getattr(torch, dtype)})
            seconds = in_turn({"ours": lambda: ours.encode(texts),
                               "theirs": lambda: theirs.encode(texts)}, cfg.rounds)
            near = (ours.encode(texts[:8]) * theirs.encode(texts[:8])).sum(1).min()
            if near < 0.99:
                raise ValueError(f"both sides should be one model: cosine {near}")
            found.row(f"encoding {dtype}", ratio(seconds["theirs"], seconds["ours"]),
                      texts_per_second=len(texts) / statistics.median(seconds["ours"]))


# ---------------------------------------------------------------- the soft mask

def soft_steps(cfg, found, device="cpu"):
    """Measure a step under the soft mask against the same step bidirectional."""
    model = bench_model(cfg, device)
    for t in cfg.soft_lengths:
        lengths = [t] * max(2, 4096 // t)
        ids = random_ids(lengths, cfg.vocab_size, device)
        seconds = in_turn({name: lambda m=mask: training_step(model, ids, lengths, m)
                           for name, mask in (("soft", MaskSpec(0.3)), ("full", FULL))},
                          cfg.rounds, device)
        found.row(f"soft step {t}", ratio(seconds["soft"], seconds["full"]))


def attention_call(t, mask, device, dtype, heads=(8, 8, 64)):
    """Return a callable: forward and backward of one text's attention, its mask included."""
    h, k, e = heads
    leaf = torch.randn(t, h + 2 * k, e, device=device, dtype=dtype).requires_grad_()

    def run():
        packing = Packing([t], device)
        packing.set_mask(mask, dtype)
        parts = leaf.split([h, k, k], dim=1)
        if packing.texts is not None:
            out = attend_packed(*parts, packing.texts, mask)
        else:
            q, k_, v = (x.transpose(0, 1)[None] for x in parts)             # (1, H, T, E)
            out = attend(q, k_, v, packing.groups[0], mask)
        out.sum().backward()
        leaf.grad = None
    return run


def by_length(cfg, found, device="cpu"):
    """Measure attention alone by length: causal, soft, bidirectional; a table, no row."""
    dtype, table = torch.float32 if device == "cpu" else torch.bfloat16, []
    masks = {"causal": CAUSAL, "soft": MaskSpec(0.3), "full": FULL}
    longest = cfg.longest if device == "cpu" else 32_768
    for t in (n for n in (512, 1024, 2048, 4096, 8192, 16_384, 32_768) if n <= longest):
        sides = {name: attention_call(t, mask, device, dtype) for name, mask in masks.items()}
        seconds = in_turn(sides, cfg.rounds if t <= 4096 or device != "cpu" else 1, device)
        table.append({"tokens": t, **{
            f"{name}, {unit}": value for name in masks for unit, value in (
                ("ms", 1000 * statistics.median(seconds[name])),
                ("MB", peak_memory(sides[name], device) / 1e6))}})
    found.table(f"attention by length, forward and backward, 8 heads of 64, {dtype}", table)


# ---------------------------------------------------------------- steps

def write_rows(folder, n, rng):
    """Write n made-up retrieval rows of real lengths."""
    queries, passages = make_texts(n, rng, mean=14, longest=48), make_texts(n, rng)
    path = Path(folder) / "retrieval.jsonl"
    path.write_text("".join(json.dumps({"query": q, "pos": [p]}) + "\n"
                            for q, p in zip(queries, passages)))
    return str(path)


def supervised(cfg, found):
    """Measure DHNM's share of a step, and the share of making its batches."""
    rng = np.random.default_rng(3)
    train_cfg = train.TrainConfig(stage="embed_sup", n_embd=cfg.n_embd, n_head=cfg.n_head,
                                  n_kv_head=cfg.n_kv_head, batch_size=cfg.pairs, query_len=48,
                                  passage_len=256, n_negatives=3, dims=(cfg.n_embd // 2,
                                                                        cfg.n_embd))
    world = distributed.World(0, 1, torch.device("cpu"))
    model = bench_model(cfg)
    optimizer = train.build_optimizer(model, train_cfg)
    spent = {"data": 0.0, "step": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        task = Task("retrieval", train_cfg, words()[1], world,
                    (write_rows(folder, 8 * cfg.pairs, rng),))
        candidates = torch.from_numpy(rng.permuted(np.tile(np.arange(len(task.passages)),
                                                           (len(task.rows), 1)), axis=1)[:, :50])
        pools = {policy: HardNegativePool(candidates, 3, policy=policy)
                 for policy in ("v2", "fixed")}

        def step(policy):
            task.pool, k = pools[policy], len(seen[policy])
            seen[policy].append(k)
            began = time.perf_counter()
            batch = task.batch(k)
            spent["data"] += time.perf_counter() - began
            with world.autocast("bfloat16"):
                _, scores, _ = train.stage_loss(model, batch, train_cfg, 0)
            distributed.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if policy == "v2":
                task.pool.update(torch.from_numpy(batch.rows), scores)
            spent["step"] += time.perf_counter() - began
            return (time.perf_counter() - began) / len(batch.ids)  # other negatives, other lengths
        seen = {policy: [] for policy in pools}
        seconds = in_turn({policy: lambda p=policy: step(p) for policy in pools}, 3 * cfg.rounds)
    found.row("DHNM step", ratio(seconds["v2"], seconds["fixed"]))
    found.row("data wait share", spent["data"] / spent["step"])


def padding(cfg, found, device="cpu"):
    """Measure the pads of embedding batches of real lengths, and what padding would cost."""
    rng, pads, places = np.random.default_rng(4), 0, 0
    for _ in range(20):
        lengths = np.concatenate([np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8, cfg.pairs), 3,
                                          longest).astype(int)
                                  for mean, longest in ((14, 48), (61, 256))])
        packing = Packing(lengths.tolist(), device)
        packing.set_mask(FULL, torch.bfloat16)
        if packing.texts is None:
            places += len(packing.padded)
            pads += len(packing.padded) - int(lengths.sum())
        else:
            places += int(lengths.sum())
    found.row("padding share", pads / places)
    if device == "cpu":
        model, lengths = bench_model(cfg), lengths.tolist()
        padded = [max(lengths)] * len(lengths)
        ids, wide = (random_ids(x, cfg.vocab_size) for x in (lengths, padded))
        seconds = in_turn({"packed": lambda: training_step(model, ids, lengths),
                           "padded": lambda: training_step(model, wide, padded)}, cfg.rounds)
        found.row("padded step over packed", ratio(seconds["padded"], seconds["packed"]))


def cached(cfg, found, device="cpu"):
    """Measure the two-pass step over 16 chunks; in time against 16 passes of a chunk each."""
    model = bench_model(cfg, device)
    lengths = [64] * (2 * cfg.pairs)
    many = lengths * 16
    ids, all_ids = (random_ids(x, cfg.vocab_size, device) for x in (lengths, many))

    def one():
        training_step(model, ids, lengths)

    def two_pass():
        training_step(model, all_ids, many, chunks=16)

    seconds = in_turn({"two": two_pass, "one": lambda: [one() for _ in range(16)] and None},
                      cfg.rounds, device)
    memory = [peak_memory(two_pass, device) / peak_memory(one, device) for _ in range(3)]
    found.row("cached memory", statistics.median(memory))
    found.row("cached time", ratio(seconds["two"], seconds["one"]))


def head(cfg, found, device="cpu"):
    """Measure the chunked cross-entropy over a large vocabulary against all logits at once."""
    d = cfg.n_embd if device == "cpu" else 3584
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(cfg.head_tokens, d, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(cfg.head_vocab, d, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, cfg.head_vocab, (cfg.head_tokens,), device=device)

    def run(loss):
        loss.backward()
        hidden.grad = weight.grad = None

    sides = {"chunked": lambda: run(lm_cross_entropy(hidden, weight, targets)),
             "naive": lambda: run(F.cross_entropy((hidden @ weight.to(dtype).T).float(), targets))}
    seconds = in_turn(sides, cfg.rounds, device)
    memory = {name: peak_memory(side, device) for name, side in sides.items()}
    found.row("head time", ratio(seconds["chunked"], seconds["naive"]))
    found.row("head memory", memory["chunked"] / memory["naive"],
              megabytes=memory["chunked"] / 1e6, naive=memory["naive"] / 1e6)


# ---------------------------------------------------------------- the tokenizer

def python_source(megabytes):
    """Return installed Python source, about so much of it."""
    texts, size = [], 0
    for path in sorted(Path(torch.__file__).parent.parent.rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    return texts, size / 1e6


def their_tokenizer(texts, vocab_size):
    """Train a Hugging Face tokenizer on the same words."""
    from tokenizers import Regex, Tokenizer as Other, models, pre_tokenizers, trainers
    other = Other(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    other.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def tokenizing(cfg, found):
    """Measure training and encoding of the tokenizer."""
    if missing("tokenizers"):
        return
    import warnings
    from tokenizers import Tokenizer as Other
    backend = "python" if missing("rustbpe") else "rustbpe"
    texts, megabytes = python_source(cfg.tokenizer_mb)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # a corpus may have too few words
        seconds = in_turn({
            "ours": lambda: Tokenizer.train(texts, cfg.head_vocab, backend=backend) and None,
            "theirs": lambda: their_tokenizer(texts, cfg.head_vocab)}, max(1, cfg.rounds // 2))
        ours = Tokenizer.train(texts, cfg.head_vocab, backend=backend)
    found.row("tokenizer training", ratio(seconds["theirs"], seconds["ours"]), backend=backend,
              megabytes_per_second=megabytes / statistics.median(seconds["ours"]))
    theirs = Other.from_str(json.dumps(export.tokenizer_json(ours)))
    part = texts[:max(1, len(texts) // 10)]
    if [x.ids for x in theirs.encode_batch(part[:5])] != ours.encode_batch(part[:5]):
        raise ValueError("both sides should give the same ids")
    seconds = in_turn({"ours": lambda: ours.encode_batch(part) and None,
                       "theirs": lambda: theirs.encode_batch(part) and None}, cfg.rounds)
    size = sum(len(text.encode()) for text in part) / 1e6
    found.row("tokenizer encoding", ratio(seconds["theirs"], seconds["ours"]),
              megabytes_per_second=size / statistics.median(seconds["ours"]))


# ---------------------------------------------------------------- the GPU

def matmul_rate():
    """Return the FLOP/s of a large bfloat16 matmul, the ceiling of this very card."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = in_turn({"": lambda: [a @ b for _ in range(10)] and None}, 5, "cuda")[""]
    return 10 * 2 * 8192 ** 3 / statistics.median(seconds)


def full_size(found):
    """Return the 1.4B model of the paper on the card, with its optimizer."""
    shape = ConanConfig()
    with torch.device("cuda"):
        model = Conan(shape).init_weights()
    found.machine["parameters"] = model.count_params()
    return model, train.build_optimizer(model, train.TrainConfig())


def stages(cfg, found):
    """Measure whole steps of all four stages at full size: tokens/s, FLOP/s, peak memory."""
    model, optimizer = full_size(found)
    rate, rng, table = matmul_rate(), np.random.default_rng(5), []
    mixed = np.clip(rng.lognormal(np.log(512) - 0.32, 0.8, 64), 16, 4096).astype(int).tolist()
    found.machine["matmul TFLOP/s"] = rate / 1e12
    for name, lengths, mask, lm, checkpointing in (
            ("LM 2048", [2048] * 16, CAUSAL, True, False),
            ("LM 32768", [32_768], CAUSAL, True, False),
            ("SFT", mixed, CAUSAL, True, False),
            ("weak 512", mixed, MaskSpec(0.3), False, False),
            ("weak 32768", [32_768] * 2, MaskSpec(0.3), False, True),
            ("causal 32768", [32_768] * 2, CAUSAL, False, True),
            ("embedding 512", mixed, FULL, False, False)):
        model.checkpointing = checkpointing
        ids = random_ids(lengths, model.config.vocab_size, "cuda")

        def step():
            with torch.autocast("cuda", torch.bfloat16):
                if lm:
                    model(ids, lengths, mask, ids.roll(-1)).backward()
                else:
                    x = model(ids, lengths, mask)
                    info_nce(*x.chunk(2), temperature=0.05)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = statistics.median(in_turn({"": step}, cfg.rounds, "cuda")[""])
        per_text = {t: lengths.count(t) for t in set(lengths)}
        flops = budget.flops(model.config, per_text, head=lm, causal=mask.is_causal)
        table.append({"step": name, "tokens": len(ids), "tokens/s": len(ids) / seconds,
                      "TFLOP/s": flops / seconds / 1e12, "share": flops / seconds / rate,
                      "GB": peak_memory(step, "cuda") / 1e9})
        if f"{name} share of matmul rate" in GOALS:
            found.row(f"{name} share of matmul rate", flops / seconds / rate,
                      tokens_per_second=len(ids) / seconds)
    found.table("steps of the full model", table)
    reviews(cfg, found, model)


def reviews(cfg, found, model):
    """Measure encoding short reviews of 60 tokens; the paper's card does 649 a second."""
    lengths = [60] * 1024

    @torch.no_grad()
    def run():
        ids = random_ids(lengths, model.config.vocab_size, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, lengths)
    seconds = statistics.median(in_turn({"": run}, cfg.rounds, "cuda")[""])
    found.row("encoding reviews", len(lengths) / seconds / 649,
              texts_per_second=len(lengths) / seconds)


def soft_attention(cfg, found, t=32_768, h=32, k=8, e=112):
    """Measure soft-mask attention at full length, by two calls and by Flex, beside the best kernel.

    The best bidirectional one is whichever of cuDNN's and flash attention is faster here.
    """
    leaf = torch.randn(t, h + 2 * k, e, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def run(kernel):
        kernel(*leaf.split([h, k, k], dim=1)).sum().backward()
        leaf.grad = None

    at = torch.arange(t, device="cuda", dtype=torch.float32)
    soft = {}
    for axis in ("row", "col"):
        soft[axis] = flash.Texts([t], "cuda")
        soft[axis].weigh(future_weight(at, t, 0.3), axis)
    sides = {"cuDNN": lambda: run(lambda q, k, v: flash.equal_lengths(q, k, v, 1, False)),
             "flash": lambda: run(lambda q, k, v: flash.packed(q, k, v, soft["row"], "all"))}
    for axis, texts in soft.items():
        sides[f"two calls, {axis}"] = lambda x=texts: run(
            lambda q, k, v: flash.packed(q, k, v, x, "soft"))
        sides[f"flex, {axis}"] = lambda x=texts: run(
            lambda q, k, v: flash.flex(q, k, v, x))
    seconds = in_turn(sides, cfg.rounds, "cuda")
    memory = {name: peak_memory(side, "cuda") for name, side in sides.items()}
    found.table(f"attention of {t} tokens, forward and backward", [
        {"kernel": name, "ms": 1000 * statistics.median(seconds[name]), "MB": memory[name] / 1e6}
        for name in sides])
    best = min(("cuDNN", "flash"), key=lambda name: statistics.median(seconds[name]))
    found.row(f"soft attention {t} time", ratio(seconds["two calls, row"], seconds[best]))
    found.row(f"soft attention {t} memory", memory["two calls, row"] / memory[best])


# ---------------------------------------------------------------- what is printed and written

MEASURES = {"fixed": partial(training, name="fixed", longest=64, fixed=80),
            "real": partial(training, name="real", longest=256, fixed=None),
            "encoding": encoding, "soft": soft_steps, "length": by_length,
            "supervised": supervised, "padding": padding, "cached": cached, "head": head,
            "tokenizer": tokenizing}
ON_GPU = {"stages": stages, "attention": soft_attention, "soft": soft_steps, "length": by_length,
          "padding": padding, "cached": cached, "head": head}


class Found:
    """Rows and tables of one device; a measurement taken again replaces its rows alone."""

    def __init__(self, path, device):
        self.path, self.rows, self.tables = Path(path), {}, {}
        name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        self.machine = {"device": name, "cores": os.cpu_count(), "torch": torch.__version__}
        if self.path.is_file():
            before = json.loads(self.path.read_text())
            self.rows, self.tables = before.get("rows", {}), before.get("tables", {})
            self.machine = before.get("machine", {}) | self.machine

    def row(self, name, measured, **more):
        """Keep and print one number beside its floor and its goal."""
        floor, goal = GOALS.get(name, (None, None))
        verdict = "" if floor is None else "goal" if (measured <= goal if goal < floor else
                                                      measured >= goal) else \
            "floor" if (measured <= floor if goal < floor else measured >= floor) else "MISSED"
        meaning = next((text for key, text in sorted(MEANS.items(), key=lambda x: -len(x[0]))
                        if name.startswith(key)), "")
        self.rows[name] = {"measured": measured, "floor": floor, "goal": goal, "met": verdict,
                           "what": meaning, "load": os.getloadavg()[0], **more}
        shown = "".join(f"{'' if x is None else format(x, '.3g'):>9}"
                        for x in (floor, goal, measured))
        print(f"{name:<36}{shown}  {verdict:<7}{meaning}", flush=True)
        self.write()

    def table(self, name, rows):
        """Keep and print a table."""
        self.tables[name] = rows
        print(f"\n{name}\n" + "".join(f"{key:>16}" for key in rows[0]))
        for row in rows:
            print("".join(f"{value if isinstance(value, str) else format(value, '.4g'):>16}"
                          for value in row.values()), flush=True)
        print()
        self.write()

    def write(self):
        """Write everything; what is measured before an interruption is not lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows,
                                         "tables": self.tables}, indent=1) + "\n")


def main(argv=None):
    """Measure what this machine can, print each row beside its floor and goal, write the files."""
    cfg = load_config(BenchConfig, argv)
    unknown = set(cfg.only) - set(MEASURES) - set(ON_GPU)
    if unknown:
        sys.exit(f"no such measurement: {', '.join(sorted(unknown))}; there are "
                 f"{', '.join({**MEASURES, **ON_GPU})}")
    devices = [d for d in ("cpu", "cuda") if cfg.device in ("auto", d)
               and (d == "cpu" or torch.cuda.is_available())]
    for device in devices:
        distributed.start(device)
        distributed.seed_everything(0)
        found = Found(Path(cfg.out) / f"bench_{'cpu' if device == 'cpu' else 'gpu'}.json", device)
        print(f"\n{found.machine}\n{'':<36}{'floor':>9}{'goal':>9}{'measured':>9}")
        for name, measure in (MEASURES if device == "cpu" else ON_GPU).items():
            if not cfg.only or name in cfg.only:
                extra = {"device": device} if device == "cuda" and name in MEASURES else {}
                measure(cfg, found, **extra)


if __name__ == "__main__":
    main()
