"""Measure speed and memory beside what a user would pick instead; every row has a floor and a goal.

    python -m experiments.bench                              # all that this machine can measure
    python -m experiments.bench --only=lm,encoding           # some again; the others stay
    python -m experiments.bench --device=cpu --rounds=9

Sides of a comparison run in turn, `rounds` times after a warm-up. A row is the median of the paired
ratios, with their quartiles. The shape is that of a recipe (`--config`). `Plain` is a transformer
with a plain loop in nanoGPT's manner: padded batches, SDPA, all logits at once. Results go to
results/bench_cpu.json and bench_gpu.json. Rows that need a missing optional package are left out.
"""
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
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
import torch.nn as nn
import torch.nn.functional as F

import data
import train
from configurator import load_config
from dhnm import HardNegativePool
from embed import Embedder
from engine import budget, distributed, kernels, run
from engine.microbatch import two_pass
from experiments.results import write_result
from losses import info_nce
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig, next_token_loss, rope, rope_angles
from tokenizer import PATTERN, Tokenizer
from tools import export
from train import TrainConfig

DTYPES = ("float32", "bfloat16")
GOALS = {                              # start of a row's name: (floor, goal, what is measured)
    "LM": (1.05, 1.2, "tokens/s of stage 1, over the plain loop's"),
    "fixed": (0.95, 1.1, "pairs/s of stage 3, texts of 64 tokens"),
    "fixed defaults": (1.7, 2.5, "pairs/s of stage 3, each side with its default dtype"),
    "real defaults": (5.0, 8.0, "pairs/s of stage 3, each side with its default dtype"),
    "real": (2.5, 4.5, "pairs/s of stage 3, texts of real lengths"),
    "encoding": (1.15, 1.4, "texts/s, over those of SentenceTransformer.encode"),
    "latency": (None, None, "milliseconds of one short query"),
    "soft step": (1.15, 1.05, "seconds under the soft mask, over bidirectional"),
    "DHNM step": (1.02, 1.0, "seconds of a step with the pool's work, over without"),
    "two-pass memory": (1.15, 1.05, "16 chunks in two passes, over one chunk in one"),
    "two-pass time": (1.4, 1.33, "16 chunks in two passes, over one pass of each"),
    "head time": (1.25, 1.0, "cross-entropy in chunks, over all logits at once"),
    "head memory": (1 / 8, 1 / 14, "cross-entropy in chunks, over all logits at once"),
    "tokenizer training": (2.0, 2.6, "MB/s, over Hugging Face tokenizers"),
    "tokenizer encoding": (4.0, 6.5, "MB/s, over Hugging Face tokenizers"),
    "full LM 2048": (0.50, 0.65, "model FLOP/s, share of this card's matmul rate"),
    "full LM 32768": (0.40, 0.52, "model FLOP/s, share of this card's matmul rate"),
    "full": (None, None, "model FLOP/s, share of this card's matmul rate"),
    "soft attention time": (2.0, 1.3, "two calls of flash attention, over bidirectional"),
    "soft attention memory": (1.2, 1.05, "two calls of flash attention, over bidirectional")}


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `python -m experiments.bench`."""
    rounds: int = 5                # times that each side is measured
    only: tuple[str, ...] = ()     # measurements to take (see ON_CPU, ON_GPU); empty: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the CPU, and the GPU if there is one
    results: str = "results"       # folder of bench_cpu.json and bench_gpu.json
    config: str = "config"         # folder of the recipe whose shape and batches the rows have
    pairs: int = 64                # of a contrastive step
    texts: int = 1000              # to encode
    head_vocab: int = 150_000      # words of the cross-entropy and of the tokenizer
    head_tokens: int = 2048
    tokenizer_mb: float = 60.0     # of installed Python source
    soft_lengths: tuple[int, ...] = (512, 1024, 2048)

    def stage(self, number=0):
        """Return the recipe's `TrainConfig` of stage 1 to 4, counted from 0."""
        return run.chain(TrainConfig, [f"{self.config}/embed_sup.py"])[number]

    def model(self, device="cpu", **changes):
        """Return a `Conan` of the recipe's shape with fresh weights."""
        config = dataclasses.replace(self.stage().model_config(), **changes)
        ops = kernels.pick(torch.device(device))
        return Conan(config, ops=ops).init_weights(torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------- how things are measured

def in_turn(sides, rounds, device="cpu"):
    """Return {name: [seconds]} of some callables, called in turn `rounds` times after a warm-up.

    Every other turn runs backwards, since the first of a turn was seen to take 3 % longer. A
    callable that returns a float has measured its seconds itself.
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


def ratios(above, below):
    """Return the ratios of paired measurements."""
    return [a / b for a, b in zip(above, below)]


def peak_memory(work, device="cpu"):
    """Return the bytes of tensors that `work` holds at most, beyond what existed before."""
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
    """Tell, and print, whether one of some optional packages is not installed."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"left out: {', '.join(lacking)} is not installed (requirements-extras.txt)")
    return bool(lacking)


def autocast(device, dtype):
    """Return the context of bfloat16 matmuls, or one that does nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------- the plain side

class Plain(nn.Module):
    """A `Conan` run as one would write it first: (B, T) batches, SDPA, no layout, no chunks."""

    def __init__(self, model):
        super().__init__()
        self.model = Conan(model.config)           # the plain operations
        self.model.load_state_dict(model.state_dict())

    def forward(self, ids, pad=None):
        """Return hidden states (B, T, D) of ids (B, T): causal without `pad`, else bidirectional.

        pad: (B, T) bool, True = token.
        """
        m, c, (b, t) = self.model, self.model.config, ids.shape
        cos, sin = rope_angles(t, c.head_dim, c.rope_base)

        def heads(x, proj):                        # (B, heads, T, E)
            return proj(x).view(b, t, -1, c.head_dim).transpose(1, 2)

        def norm(x, layer):
            return F.rms_norm(x, (c.n_embd,), layer.weight, c.norm_eps)

        x, bias = m.embed_tokens(ids), None if pad is None else pad[:, None, None]
        for block in m.layers:
            a, y = block.self_attn, norm(x, block.input_layernorm)
            q, k = (rope(heads(y, proj), cos, sin) for proj in (a.q_proj, a.k_proj))
            y = F.scaled_dot_product_attention(q, k, heads(y, a.v_proj), bias,
                                               is_causal=pad is None, enable_gqa=True)
            x = x + a.o_proj(y.transpose(1, 2).flatten(2))
            y, ff = norm(x, block.post_attention_layernorm), block.mlp
            x = x + ff.down_proj(F.silu(ff.gate_proj(y)) * ff.up_proj(y))
        return norm(x, m.norm)

    def lm_loss(self, windows):
        """Return the next-token loss of windows (B, T + 1)."""
        logits = self(windows[:, :-1]) @ self.model.embed_tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def embed(self, ids):
        """Return mean embeddings (B, D) of lists of ids, padded to the longest."""
        longest = max(map(len, ids))
        pad = torch.arange(longest) < torch.tensor([len(x) for x in ids])[:, None]
        x = self(torch.tensor([x + [0] * (longest - len(x)) for x in ids]), pad).float()
        return (x * pad[..., None]).sum(1) / pad.sum(1, keepdim=True)


def step_of(model, cfg, dtype, backward):
    """Return a callable: forward and backward, clipping, AdamW. backward(): fills gradients."""
    optimizer = train.build_optimizer(model, cfg)

    def step():
        with autocast(str(next(model.parameters()).device.type), dtype):
            backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# ---------------------------------------------------------------- training

def lm_batch(windows):
    """Return a stage 1 `Batch` of windows (B, T + 1)."""
    return data.Batch("text", windows[:, :-1].reshape(-1), [windows.shape[1] - 1] * len(windows),
                      np.arange(len(windows)), targets=windows[:, 1:].reshape(-1))


def lm(cfg, rows):
    """Measure tokens/s of stage 1 against the plain loop, at the recipe's windows and batch."""
    stage, model = cfg.stage(), cfg.model()
    windows = torch.randint(0, stage.vocab_size, (stage.batch_size, stage.passage_len + 1))
    batch, plain = lm_batch(windows), Plain(model)
    for dtype in DTYPES:
        seconds = in_turn({
            "ours": step_of(model, stage, dtype, lambda: train.step_loss(model, batch, stage, 0)),
            "plain": step_of(plain, stage, dtype, lambda: plain.lm_loss(windows).backward())},
            cfg.rounds)
        rows.add(f"LM {dtype}", ratios(seconds["plain"], seconds["ours"]),
                 tokens_per_second=len(batch.ids) / statistics.median(seconds["ours"]))


def growth(cfg, rows):
    """Measure seconds of a stage 1 step against tokens, layers, vocabulary and batch: a table."""
    stage, table = cfg.stage(), []
    base = {"tokens": stage.passage_len, "layers": stage.n_layer, "vocabulary": stage.vocab_size,
            "batch": max(1, stage.batch_size // 4)}
    for name in [None, *base]:
        shape = base | ({name: 2 * base[name]} if name else {})
        model = cfg.model(n_layer=shape["layers"], vocab_size=shape["vocabulary"])
        batch = lm_batch(torch.randint(0, shape["vocabulary"],
                                       (shape["batch"], shape["tokens"] + 1)))
        step = step_of(model, stage, "bfloat16", lambda: train.step_loss(model, batch, stage, 0))
        table.append({**shape, "seconds": statistics.median(in_turn({"": step}, cfg.rounds)[""])})
        print(table[-1], flush=True)
    rows.keep(growth=table)


@cache
def words():
    """Return made-up words, and a tokenizer that knows each of them as one token."""
    rng = np.random.default_rng(0)
    made = sorted({"".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 9)))
                   for _ in range(1200)})
    return made, Tokenizer.train([" " + " ".join(made)] * 3, 3700)


def make_texts(n, rng, mean=61, longest=256, fixed=None):
    """Return n texts of `fixed` tokens, or of log-normal lengths before the cut at `longest`."""
    draw = rng.lognormal(np.log(mean) - 0.32, 0.8, n)
    lengths = [fixed] * n if fixed else np.clip(draw, 3, longest).astype(int)
    return [" ".join(rng.choice(words()[0], int(k))) for k in lengths]


def our_backward(model, stage, texts, longest):
    """Tokenise pairs, and run the trainer's own step; texts: queries, then passages."""
    ids = torch.arange(len(texts) // 2)
    batch = data.Batch.of("pairs", texts, [longest] * len(texts), words()[1], np.arange(len(ids)),
                          query_ids=ids, positive_ids=ids + len(ids))
    train.step_loss(model, batch, stage, 0)


def plain_backward(model, texts, longest):
    """Tokenise pairs, pad them, and run InfoNCE as a plain loop would."""
    tokenizer = words()[1]
    x = F.normalize(model.embed([data.end_text(ids, longest, tokenizer.eos_id) for ids in
                                 tokenizer.encode_batch(texts)]), dim=1)
    q, p = x.chunk(2)
    F.cross_entropy(q @ p.T / 0.05, torch.arange(len(q))).backward()


def their_step(folder, texts, longest, dtype, steps=3):
    """Return a callable: seconds of a step of SentenceTransformerTrainer, as its manual has it."""
    from datasets import Dataset
    from sentence_transformers import (SentenceTransformer, SentenceTransformerTrainer,
                                       SentenceTransformerTrainingArguments, losses)
    from transformers import TrainerCallback
    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = longest
    half = len(texts) // 2
    rows = Dataset.from_dict({"anchor": texts[:half] * (steps + 1),
                              "positive": texts[half:] * (steps + 1)})
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    def run_steps():
        times.clear()
        args = SentenceTransformerTrainingArguments(
            output_dir=f"{folder}/run", max_steps=steps + 1, use_cpu=True, report_to="none",
            per_device_train_batch_size=half, bf16=dtype == "bfloat16", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
        SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, callbacks=[Clock()],
                                   loss=losses.MultipleNegativesRankingLoss(model)).train()
        return (times[-1] - times[0]) / steps              # its first step sets things up
    return run_steps


def exported(cfg, folder, longest):
    """Write the recipe's model as a directory that sentence-transformers loads; return its path."""
    prompts = dict.fromkeys(data.PROMPTS, "")
    embedder = Embedder.of(cfg.model(), words()[1], FULL, longest, prompts)
    embedder.checkpoint = Path(folder) / "none" / "step_000000"
    embedder.meta = {"model": dataclasses.asdict(embedder.model.config),
                     "mask": dataclasses.asdict(FULL), "passage_len": longest, "step": 0,
                     "prompts": prompts, "versions": run.versions(),
                     "train": dataclasses.asdict(cfg.stage(3))}
    path = Path(folder) / f"exported_{longest}"
    path.mkdir()
    export.write(embedder, path, "bench", False)
    return str(path)


def contrastive(cfg, rows, name, longest, fixed):
    """Measure pairs/s of stage 3 in both dtypes; texts of `fixed` words, None: of real lengths."""
    rng = np.random.default_rng(1)
    texts = make_texts(2 * cfg.pairs, rng, fixed=fixed)
    stage = dataclasses.replace(cfg.stage(2), schedule="hard", micro_batch_size=0)
    theirs = not missing("sentence_transformers", "datasets", "accelerate")
    plain_loop, other = "plain loop", "sentence-transformers"
    with tempfile.TemporaryDirectory() as folder:
        path, sides = exported(cfg, folder, longest) if theirs else None, {}
        for dtype in DTYPES:
            ours, plain = cfg.model(), Plain(cfg.model())
            sides["ours", dtype] = step_of(ours, stage, dtype, partial(
                our_backward, ours, stage, texts, longest))
            sides[plain_loop, dtype] = step_of(plain, stage, dtype, partial(
                plain_backward, plain, texts, longest))
            if theirs:
                sides[other, dtype] = their_step(path, texts, longest, dtype)
        seconds = in_turn(sides, cfg.rounds)
    for who, dtype in sides:
        if who != "ours":
            rows.add(f"{name} {dtype} over {who}", ratios(seconds[who, dtype],
                                                          seconds["ours", dtype]),
                     pairs_per_second=cfg.pairs / statistics.median(seconds["ours", dtype]))
    if theirs:                                     # ours: bfloat16, theirs: float32
        rows.add(f"{name} defaults over {other}", ratios(seconds[other, "float32"],
                                                         seconds["ours", "bfloat16"]))


def encoding(cfg, rows):
    """Measure encoding texts/s at real lengths, and the latency of single short queries."""
    texts = make_texts(cfg.texts, np.random.default_rng(2))
    queries = make_texts(100, np.random.default_rng(3), mean=8, longest=16)
    theirs = not missing("sentence_transformers")
    with tempfile.TemporaryDirectory() as folder:
        path = exported(cfg, folder, 256) if theirs else None
        for dtype in DTYPES:
            ours = Embedder.of(cfg.model(), words()[1], FULL, 256, dtype=dtype)
            sides = {"ours": lambda: ours.encode(texts) is None}
            if theirs:
                from sentence_transformers import SentenceTransformer
                other = SentenceTransformer(path, device="cpu",
                                            model_kwargs={"dtype": getattr(torch, dtype)})
                sides["theirs"] = lambda: other.encode(texts) is None
                near = (ours.encode(texts[:8]) * other.encode(texts[:8])).sum(1).min()
                if near < 0.99:
                    raise ValueError(f"both sides should be one model: cosine {near}")
            seconds = in_turn(sides, cfg.rounds)
            if theirs:
                rows.add(f"encoding {dtype}", ratios(seconds["theirs"], seconds["ours"]),
                         texts_per_second=len(texts) / statistics.median(seconds["ours"]))
            each = in_turn({q: lambda q=q: ours.encode([q]) is None for q in set(queries)}, 1)
            times = [1000 * value for values in each.values() for value in values]
            for share in (50, 99):
                rows.add(f"latency {dtype}, p{share}", [float(np.percentile(times, share))])


# ---------------------------------------------------------------- parts of a step

def training_step(model, ids, lengths, mask=FULL, chunks=1):
    """Run forward, InfoNCE and backward of a batch of pairs; `chunks` > 1: in two passes."""
    b, ends = len(lengths) // 2, np.cumsum([0, *lengths])
    cuts = np.linspace(0, len(lengths), chunks + 1).astype(int)
    parts = [(ids[ends[i]:ends[j]], lengths[i:j]) for i, j in zip(cuts, cuts[1:])]
    with autocast(ids.device.type, "bfloat16"):
        two_pass(lambda part: model(*part, mask), parts,
                 lambda x: info_nce(x[:b], x[b:], temperature=0.05), contextlib.nullcontext)
    model.zero_grad(set_to_none=True)


def random_ids(lengths, model, device="cpu"):
    """Return random flat ids of texts of these lengths."""
    return torch.randint(0, model.config.vocab_size, (sum(lengths),), device=device)


def soft_steps(cfg, rows, device="cpu"):
    """Measure a step under the soft mask against the same step bidirectional."""
    model = cfg.model(device, block_size=max(cfg.soft_lengths))
    for t in cfg.soft_lengths:
        lengths = [t] * max(2, 4096 // t)
        ids = random_ids(lengths, model, device)
        seconds = in_turn({name: partial(training_step, model, ids, lengths, mask) for name, mask
                           in (("soft", MaskSpec(0.3)), ("full", FULL))}, cfg.rounds, device)
        rows.add(f"soft step {t}", ratios(seconds["soft"], seconds["full"]))


def dhnm(cfg, rows, n_negatives=7, n_queries=3000):
    """Measure what the pool adds to a step: reading negatives and taking in their scores."""
    stage, model, rng = cfg.stage(3), cfg.model(), np.random.default_rng(3)
    pool = HardNegativePool([rng.permutation(n_queries)[:50].tolist() for _ in range(n_queries)],
                            n_negatives)
    lengths = [stage.passage_len] * (stage.batch_size * (2 + n_negatives))
    ids = random_ids(lengths, model)

    def work():
        queries = rng.choice(n_queries, stage.batch_size, replace=False)
        pool.negatives(queries)
        pool.update(torch.from_numpy(queries), torch.rand(len(queries), n_negatives))

    seconds = in_turn({"pool": work, "step": partial(training_step, model, ids, lengths)},
                      cfg.rounds)
    rows.add("DHNM step", [1 + x for x in ratios(seconds["pool"], seconds["step"])])


def passes(cfg, rows, device="cpu"):
    """Measure the two-pass step over 16 chunks; in time against 16 passes of a chunk each."""
    model, lengths = cfg.model(device), [64] * (2 * cfg.pairs)
    ids, all_ids = (random_ids(x, model, device) for x in (lengths, lengths * 16))
    one = partial(training_step, model, ids, lengths)
    two = partial(training_step, model, all_ids, lengths * 16, chunks=16)
    seconds = in_turn({"two": two, "one": lambda: [one() for _ in range(16)] and None},
                      cfg.rounds, device)
    rows.add("two-pass memory", [peak_memory(two, device) / peak_memory(one, device)])
    rows.add("two-pass time", ratios(seconds["two"], seconds["one"]))


def head(cfg, rows, device="cpu"):
    """Measure the chunked cross-entropy over a large vocabulary against all logits at once."""
    d, dtype = (cfg.stage().n_embd, torch.float32) if device == "cpu" else (3584, torch.bfloat16)
    hidden = torch.randn(cfg.head_tokens, d, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(cfg.head_vocab, d, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(0, cfg.head_vocab, (cfg.head_tokens,), device=device)

    def work(loss):
        loss(hidden, weight, targets).backward()
        hidden.grad = weight.grad = None

    sides = {"chunked": partial(work, kernels.next_token_loss),
             "plain": partial(work, next_token_loss)}
    seconds = in_turn(sides, cfg.rounds, device)
    rows.add("head time", ratios(seconds["chunked"], seconds["plain"]))
    rows.add("head memory", [peak_memory(sides["chunked"], device)
                             / peak_memory(sides["plain"], device)])


def python_source(megabytes):
    """Return installed Python source, about so much of it, and how much it is."""
    texts, size = [], 0
    for path in sorted(Path(torch.__file__).parent.parent.rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    return texts, size / 1e6


def tokenizing(cfg, rows):
    """Measure training and encoding of the tokenizer against Hugging Face's, on the same words."""
    if missing("tokenizers"):
        return
    from tokenizers import Regex, Tokenizer as Other, models, pre_tokenizers, trainers
    texts, megabytes = python_source(cfg.tokenizer_mb)

    def theirs():
        other = Other(models.BPE())
        other.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        other.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=cfg.head_vocab, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

    seconds = in_turn({"ours": lambda: Tokenizer.train(texts, cfg.head_vocab) is None,
                       "theirs": theirs}, max(1, cfg.rounds // 2))
    rows.add("tokenizer training", ratios(seconds["theirs"], seconds["ours"]),
             megabytes_per_second=megabytes / statistics.median(seconds["ours"]))
    ours = Tokenizer.train(texts, cfg.head_vocab)
    other, part = Other.from_str(json.dumps(export.tokenizer_json(ours))), texts[::10]
    seconds = in_turn({"ours": lambda: ours.encode_batch(part) is None,
                       "theirs": lambda: other.encode_batch(part) is None}, cfg.rounds)
    rows.add("tokenizer encoding", ratios(seconds["theirs"], seconds["ours"]))


# ---------------------------------------------------------------- the GPU

def full_size(cfg, rows):
    """Measure whole steps of all stages at 1.4B: tokens/s, share of the matmul rate, memory."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = in_turn({"": lambda: [a @ b for _ in range(10)] and None}, 5, "cuda")[""]
    rate = 10 * 2 * 8192 ** 3 / statistics.median(seconds)
    stage = run.chain(TrainConfig, ["config/full/embed_sup.py"])[-1]
    with torch.device("cuda"):
        model = Conan(stage.model_config(), ops=kernels.pick(torch.device("cuda"))).init_weights()
    rng, table = np.random.default_rng(5), []
    mixed = np.clip(rng.lognormal(np.log(512) - 0.32, 0.8, 64), 16, 4096).astype(int).tolist()
    for name, lengths, mask, is_lm in (
            ("LM 2048", [2048] * 16, CAUSAL, True), ("LM 32768", [32_768], CAUSAL, True),
            ("SFT", mixed, CAUSAL, True), ("weak 512", mixed, MaskSpec(0.3), False),
            ("weak 32768", [32_768] * 2, MaskSpec(0.3), False), ("sup 512", mixed, FULL, False)):
        model.checkpointing = name == "weak 32768"
        ids = random_ids(lengths, model, "cuda")

        def backward():
            if is_lm:
                return model(ids, lengths, mask, ids.roll(-1)).backward()
            info_nce(*model(ids, lengths, mask).chunk(2), temperature=0.05)[0].backward()

        step = step_of(model, stage, "bfloat16", backward)
        seconds = in_turn({"": step}, cfg.rounds, "cuda")[""]
        flops = budget.flops(model.config, {t: lengths.count(t) for t in set(lengths)}, head=is_lm,
                             causal=mask.is_causal)
        table.append({"step": name, "tokens/s": len(ids) / statistics.median(seconds),
                      "share": flops / statistics.median(seconds) / rate,
                      "GB": peak_memory(step, "cuda") / 1e9})
        rows.add(f"full {name}", [flops / s / rate for s in seconds])
    rows.keep(steps=table)


def soft_attention(cfg, rows, t=32_768):
    """Measure attention of one text at full length under the soft mask, forward and backward."""
    config, ops = ConanConfig(), kernels.pick(torch.device("cuda"))
    h, k, e = config.n_head, config.n_kv_head, config.n_embd // config.n_head
    leaf = torch.randn(t, h + 2 * k, e, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def work(mask):
        ops.attention(*leaf.split([h, k, k], dim=1), ops.prepare([t], mask, leaf)).sum().backward()
        leaf.grad = None

    sides = {"soft": partial(work, MaskSpec(0.3)), "full": partial(work, FULL)}
    seconds = in_turn(sides, cfg.rounds, "cuda")
    rows.add("soft attention time", ratios(seconds["soft"], seconds["full"]))
    rows.add("soft attention memory", [peak_memory(sides["soft"], "cuda")
                                       / peak_memory(sides["full"], "cuda")])


# ---------------------------------------------------------------- what is printed and written

ON_CPU = {"lm": lm, "growth": growth, "encoding": encoding, "soft": soft_steps, "dhnm": dhnm,
          "fixed": partial(contrastive, name="fixed", longest=64, fixed=80),
          "real": partial(contrastive, name="real", longest=256, fixed=None),
          "passes": passes, "head": head, "tokenizer": tokenizing}
ON_GPU = {"full": full_size, "attention": soft_attention,
          **{name: partial(measure, device="cuda") for name, measure in (
              ("soft", soft_steps), ("passes", passes), ("head", head))}}


class Rows:
    """The rows of one device; a measurement that is taken again replaces its own alone."""

    def __init__(self, folder, device):
        self.folder, self.name = folder, f"bench_{'gpu' if device == 'cuda' else 'cpu'}"
        path, info = Path(folder) / f"{self.name}.json", Path("/proc/cpuinfo")
        self.content = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": {}}
        text = info.read_text("utf-8") if info.is_file() else ""
        chip = torch.cuda.get_device_name() if device == "cuda" else next(
            iter(re.findall(r"model name\s*: (.*)", text)), platform.machine())
        self.content |= {"title": f"Speed: {self.name}", "command": "python -m experiments.bench",
                         "machine": {"device": chip, "cores": os.cpu_count(),
                                     "threads": torch.get_num_threads(),
                                     "torch": torch.__version__}}

    def add(self, name, values, **more):
        """Keep and print the median of some ratios beside its floor and its goal."""
        start = max((key for key in GOALS if name.startswith(key)), key=len)
        (floor, goal, what), measured = GOALS[start], float(statistics.median(values))
        sign = -1 if floor is not None and goal < floor else 1     # -1: less is better
        met = "" if floor is None else "goal" if sign * measured >= sign * goal else \
            "floor" if sign * measured >= sign * floor else "MISSED"
        low, high = np.percentile(values, (25, 75))
        self.content["rows"][name] = {
            "measured": measured, "spread": f"{low:.3g} to {high:.3g}", "floor": floor,
            "goal": goal, "met": met, "what": what, "load": os.getloadavg()[0], **more}
        shown = "".join(f"{'' if x is None else format(x, '.3g'):>9}"
                        for x in (floor, goal, measured))
        print(f"{name:<44}{shown}  {met:<7}{what}", flush=True)
        self.keep()

    def keep(self, **tables):
        """Write everything; what is measured before an interruption is not lost."""
        self.content |= tables
        write_result(self.folder, self.name, self.content)


def main(argv=None):
    """Measure what this machine can, print each row beside its floor and goal, write the files."""
    cfg = load_config(BenchConfig, argv)
    unknown = set(cfg.only) - {*ON_CPU, *ON_GPU}
    if unknown:
        sys.exit(f"no such measurement: {', '.join(sorted(unknown))}; there are "
                 f"{', '.join({**ON_CPU, **ON_GPU})}")
    devices = [d for d in ("cpu", "cuda") if cfg.device in ("auto", d)
               and (d == "cpu" or torch.cuda.is_available())]
    for device in devices:
        distributed.start(device)                  # its allocator settings serve both sides
        distributed.seed_everything(0)
        rows = Rows(cfg.results, device)
        print(f"\n{rows.content['machine']}\n{'':<44}{'floor':>9}{'goal':>9}{'measured':>9}")
        for name, measure in (ON_CPU if device == "cpu" else ON_GPU).items():
            if not cfg.only or name in cfg.only:
                measure(cfg, rows)


if __name__ == "__main__":
    main()
