"""Measure speed and memory beside what a user would pick instead; every row has a floor and a goal.

    python -m experiments.bench                              # all rows of the CPU
    python -m experiments.bench --only=lm,encoding           # some again; the others stay
    python -m experiments.bench --device=cuda --rounds=9     # all rows of a GPU

Sides of a comparison run in turn, there and back, `rounds` times after a warm-up, on new texts each
time. A row is the median of the rounds' ratios, with quartiles. The shape is that of a recipe
(`--config`). Results go to results/bench_cpu.json or bench_gpu.json, which begins anew on another
processor. Rows that need a missing optional package are left out.
The minutes of a whole run are not here: `python -m experiments.tables default_run` has them.
"""
import dataclasses
import os
import platform
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import data
import train
from configurator import load_config, run_command
from dhnm import HardNegativePool
from embed import Embedder
from engine import distributed, kernels, run
from engine.jsonl import read_object
from experiments.runs import write_result
from mask import FULL, MaskSpec
from model import Conan, ConanConfig, next_token_loss, rope, rope_angles
from tokenizer import Tokenizer
from tools import export
from train import TrainConfig

DTYPES = ("float32", "bfloat16")
GOALS = {                              # start of a row's name: (floor, goal); less may be better
    "LM": (1.05, 1.2), "fixed": (0.95, 1.1), "fixed defaults": (1.7, 2.5), "real": (2.5, 4.5),
    "real defaults": (5.0, 8.0), "encoding": (1.15, 1.4), "soft step": (1.15, 1.05),
    "DHNM step": (1.02, 1.0), "two-pass memory": (1.15, 1.05), "two-pass time": (1.4, 1.33),
    "head time": (1.25, 1.0), "head memory": (1 / 8, 1 / 14), "soft attention time": (2.0, 1.3),
    "soft attention memory": (1.2, 1.05)}
NOTES = [                              # of what is compared
    "LM: tokens/s over a plain loop's. Fixed, real: pairs/s over sentence-transformers' model and "
    "loss, texts of 64 tokens and of real lengths. Defaults: bfloat16 over their float32.",
    "Encoding: texts/s over SentenceTransformer.encode, many at once or one short query at a time.",
    "Soft: seconds under the soft mask over bidirectional. DHNM: with the pool over without.",
    "Two-pass: 16 chunks over one chunk (memory), over 16 passes of a chunk (time). Head: "
    "cross-entropy in chunks over all logits at once."]


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `python -m experiments.bench`."""
    rounds: int = 5                # each runs every side twice, there and back
    only: tuple[str, ...] = ()     # names of MEASUREMENTS; empty: all
    device: Literal["cpu", "cuda"] = "cpu"
    results: str = "results"       # folder of bench_cpu.json and bench_gpu.json
    config: str = ""               # the recipe's folder; empty: config/small, on CUDA config/full
    pairs: int = 64                # of a contrastive step
    texts: int = 1000              # to encode
    head_vocab: int = 150_000      # words of the cross-entropy
    head_tokens: int = 2048
    soft_lengths: tuple[int, ...] = (512, 1024, 2048)

    @property
    def recipe(self):
        """The recipe's folder."""
        return self.config or f"config/{'full' if self.device == 'cuda' else 'small'}"

    def stage(self, number=0):
        """Return the recipe's `TrainConfig` of stage 1 to 4, counted from 0."""
        return run.chain(TrainConfig, [f"{self.recipe}/embed_sup.py"])[number]

    def model(self, compile=False, **changes):
        """Return a `Conan` of the recipe's shape with fresh weights, always the same ones."""
        config = dataclasses.replace(self.stage().model_config(), **changes)
        model = Conan(config, ops=kernels.pick(torch.device(self.device), compile))
        if compile:
            distributed.compile_blocks(model)
        return model.init_weights(torch.Generator().manual_seed(0)).to(self.device)


# ---------------------------------------------------------------- how things are measured

def in_turn(sides, rounds, device="cpu"):
    """Return {name: [seconds of each round]} of some callables, after a warm-up.

    A round calls them in turn, and then backwards. What came before a call was seen to change its
    time by 3 to 40 percent: by caches, and by the blocks of memory that it left.
    """
    seconds = {name: [] for name in sides}
    for turn in range(2 * rounds + 1):
        for name, work in list(sides.items())[::-1 if turn % 2 else 1]:
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:                               # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: [sum(pair) / 2 for pair in zip(taken[::2], taken[1::2])]
            for name, taken in seconds.items()}


def peak_memory(work, device="cpu"):
    """Return the bytes of tensors that `work` holds at most, beyond what existed before."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()                                     # counted by torch's allocator: exact, unlike RSS
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, *np.cumsum([0, *sizes]).tolist())


def step_of(model, stage, dtype, backward):
    """Return a callable: forward and backward, clipping, AdamW. backward(): fills gradients."""
    optimizer = train.build_optimizer(model, stage)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# ---------------------------------------------------------------- stage 1, and what growth costs

def plain_lm_loss(model, windows):
    """Return the next-token loss of windows (B, T + 1) as one would write it first.

    In nanoGPT's manner: (B, T) batches, SDPA, all logits at once. The weights are a `Conan`'s.
    """
    config, (b, t) = model.config, windows[:, 1:].shape
    cos, sin = rope_angles(t, config.head_dim, config.rope_base)

    def heads(x, proj):                            # (B, heads, T, E)
        return proj(x).view(b, t, -1, config.head_dim).transpose(1, 2)

    def norm(x, layer):
        return F.rms_norm(x, (config.n_embd,), layer.weight, config.norm_eps)

    x = model.embed_tokens(windows[:, :-1])
    for block in model.layers:
        attn, ff, y = block.self_attn, block.mlp, norm(x, block.input_layernorm)
        q, k = (rope(heads(y, proj), cos, sin) for proj in (attn.q_proj, attn.k_proj))
        y = F.scaled_dot_product_attention(q, k, heads(y, attn.v_proj), is_causal=True,
                                           enable_gqa=True)
        x = x + attn.o_proj(y.transpose(1, 2).flatten(2))
        y = norm(x, block.post_attention_layernorm)
        x = x + ff.down_proj(F.silu(ff.gate_proj(y)) * ff.up_proj(y))
    logits = norm(x, model.norm) @ model.embed_tokens.weight.T
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def lm(cfg, rows):
    """Measure tokens/s of stage 1 against the plain loop, at the recipe's windows and batch.

    The plain loop is not compiled.
    """
    stage, plain = cfg.stage(), cfg.model()
    windows = torch.randint(0, stage.vocab_size, (stage.batch_size, stage.passage_len + 1))
    batch = data.lm_batch(windows, None)
    for dtype in DTYPES:
        sides = {"": step_of(plain, stage, dtype, lambda: plain_lm_loss(plain, windows).backward())}
        names = [f"LM {dtype}", f"LM {dtype}, --compile=true"]
        for compile, name in enumerate(names if distributed.compilers() else names[:1]):
            sides[name] = step_of(model := cfg.model(compile), stage, dtype,
                                  partial(train.step_loss, model, batch, stage, 0))
        seconds = in_turn(sides, cfg.rounds)
        for name in list(sides)[1:]:
            rows.ratio(name, seconds[""], seconds[name], len(batch.ids))


def growth(cfg, rows):
    """Measure seconds of a stage 1 step against tokens, layers, vocabulary and batch: a table."""
    stage, table = cfg.stage(), []
    base = {"tokens": stage.passage_len, "layers": stage.n_layer, "vocabulary": stage.vocab_size,
            "batch": max(1, stage.batch_size // 4)}
    for name in [None, *base]:
        shape = base | ({name: 2 * base[name]} if name else {})
        model = cfg.model(n_layer=shape["layers"], vocab_size=shape["vocabulary"])
        batch = data.lm_batch(torch.randint(0, shape["vocabulary"],
                                            (shape["batch"], shape["tokens"] + 1)), None)
        step = step_of(model, stage, "bfloat16", lambda: train.step_loss(model, batch, stage, 0))
        seconds = in_turn({"": step}, cfg.rounds)[""]
        table.append({**shape, "seconds": statistics.median(seconds), "spread": quartiles(seconds)})
        print(table[-1], flush=True)
    rows.keep("growth", table)


# ---------------------------------------------------------------- stage 3, and encoding

@cache
def words():
    """Return made-up words, and a tokenizer that knows each of them as one token."""
    rng = np.random.default_rng(0)
    names = sorted({"".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 9)))
                    for _ in range(1200)})
    return names, Tokenizer.train([" " + " ".join(names)] * 3, 3700)


def make_texts(n, seed, mean=61, longest=256, fixed=None):
    """Return n texts of `fixed` tokens, or of log-normal lengths before the cut at `longest`."""
    rng = np.random.default_rng(seed)
    draw = rng.lognormal(np.log(mean) - 0.32, 0.8, n)
    lengths = [fixed] * n if fixed else np.clip(draw, 3, longest).astype(int)
    return [" ".join(rng.choice(words()[0], int(k))) for k in lengths]


def with_each(function, sets):
    """Return a callable that takes the next of `sets` each time.

    A corpus has no text twice. oneDNN builds a kernel for each number of tokens, and would find
    those of repeated texts in its cache.
    """
    sets = iter(sets)
    return lambda: function(next(sets))


def pairs(n):
    """Return what a stage 3 `Batch` says of n queries and n passages."""
    ids = torch.arange(n)
    return {"rows": np.arange(n), "query_ids": ids, "positive_ids": ids + n}


def our_backward(model, stage, longest, texts):
    """Tokenise pairs, and run the trainer's own step; texts: queries, then passages."""
    batch = data.Batch.of("pairs", texts, [longest] * len(texts), words()[1],
                          **pairs(len(texts) // 2))
    train.step_loss(model, batch, stage, 0)


def their_step(folder, stage, longest, sets, dtype):
    """Return a callable: the same step with the model and the loss of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    model = SentenceTransformer(folder, device="cpu").train()
    model.max_seq_length = longest
    loss = MultipleNegativesRankingLoss(model)

    def backward(texts):
        half = len(texts) // 2
        loss([model.preprocess(side) for side in (texts[:half], texts[half:])], None).backward()

    return step_of(model, stage, dtype, with_each(backward, sets))


def exported(cfg, folder, longest):
    """Write the recipe's model as a directory that sentence-transformers loads; return its path."""
    prompts = dict.fromkeys(data.PROMPTS, "")
    embedder = Embedder.of(cfg.model(), words()[1], FULL, longest, prompts)
    embedder.meta = {"model": dataclasses.asdict(embedder.model.config),
                     "mask": dataclasses.asdict(FULL), "passage_len": longest, "step": 0,
                     "versions": run.versions(), "train": dataclasses.asdict(cfg.stage(3))}
    path = Path(folder) / f"exported_{longest}"
    export.write(embedder, path, "bench", False)
    return str(path)


def contrastive(cfg, rows, name, longest, fixed):
    """Measure pairs/s of stage 3 in both dtypes; texts of `fixed` words, None: of real lengths."""
    sets = [make_texts(2 * cfg.pairs, i, fixed=fixed) for i in range(2 * cfg.rounds + 1)]
    sides = {}
    stage = dataclasses.replace(cfg.stage(2), schedule="hard", micro_batch_size=0)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(cfg, folder, longest)
        for dtype in DTYPES:
            model = cfg.model()
            sides["ours", dtype] = step_of(model, stage, dtype, with_each(
                partial(our_backward, model, stage, longest), sets))
            sides["theirs", dtype] = their_step(path, stage, longest, sets, dtype)
        seconds = in_turn(sides, cfg.rounds)
    for label, ours, theirs in (*zip(DTYPES, DTYPES, DTYPES), ("defaults", *DTYPES[::-1])):
        rows.ratio(f"{name} {label}", seconds["theirs", theirs], seconds["ours", ours], cfg.pairs)


def encoding(cfg, rows):
    """Measure encoding texts/s, and single short queries: the median, and the slowest of 100."""
    from sentence_transformers import SentenceTransformer
    sets = [make_texts(cfg.texts, i) for i in range(2 * cfg.rounds + 1)]
    queries = make_texts(100, 3, mean=8, longest=16)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(cfg, folder, 256)
        for dtype in DTYPES:
            ours = Embedder(path, cfg.device, dtype)
            theirs = SentenceTransformer(path, device=cfg.device,
                                         model_kwargs={"dtype": getattr(torch, dtype)})
            rows.compare(f"encoding {dtype}", with_each(theirs.encode, sets),
                         with_each(ours.encode, sets), cfg.texts)
            seconds = in_turn({(side, i): partial(side.encode, [query]) for side in (theirs, ours)
                               for i, query in enumerate(queries)}, cfg.rounds, cfg.device)
            for share in (50, 99):
                above, below = (np.percentile([seconds[side, i] for i in range(len(queries))],
                                              share, axis=0) for side in (theirs, ours))
                rows.ratio(f"encoding {dtype}, one query, p{share}", above, below,
                           milliseconds=1000 * statistics.median(below))


# ---------------------------------------------------------------- parts of a step

def pair_step(cfg, model, lengths, **settings):
    """Return a callable: the trainer's forward and backward of random pairs, at 30 % of stage 3."""
    stage = dataclasses.replace(cfg.stage(2), **{
        "schedule": "hard", "micro_batch_size": 0, **settings})
    ids = torch.randint(0, stage.vocab_size, (sum(lengths),))
    batch = data.Batch("pairs", ids, lengths, **pairs(len(lengths) // 2)).to(cfg.device)

    def work():
        with torch.autocast(cfg.device, torch.bfloat16):
            train.step_loss(model, batch, stage, int(0.3 * stage.steps))
        model.zero_grad(set_to_none=True)
    return work


def soft_steps(cfg, rows):
    """Measure a step under the soft mask against the same step bidirectional."""
    model = cfg.model(block_size=max(cfg.soft_lengths))
    for t in cfg.soft_lengths:
        rows.compare(f"soft step {t}", *(
            pair_step(cfg, model, [t] * max(2, 4096 // t), schedule=schedule)
            for schedule in ("linear", "hard")))


def dhnm(cfg, rows, n_negatives=7, n_queries=3000):
    """Measure what the pool adds to a step: reading negatives and taking in their scores."""
    stage, rng = cfg.stage(3), np.random.default_rng(3)
    pool = HardNegativePool([rng.permutation(n_queries)[:50].tolist() for _ in range(n_queries)],
                            n_negatives)
    step = pair_step(cfg, cfg.model(),
                     [stage.passage_len] * (stage.batch_size * (2 + n_negatives)))

    def work():
        queries = rng.choice(n_queries, stage.batch_size, replace=False)
        pool.negatives(queries)
        pool.update(torch.from_numpy(queries), torch.rand(len(queries), n_negatives))

    seconds = in_turn({"pool": work, "step": step}, cfg.rounds)        # far below a step's spread
    rows.add("DHNM step", [1 + pool / whole for pool, whole in zip(*seconds.values())])


def passes(cfg, rows):
    """Measure the two-pass step over 16 chunks; in time against 16 passes of a chunk each."""
    model, lengths = cfg.model(), [64] * (2 * cfg.pairs)
    one = pair_step(cfg, model, lengths)
    two = pair_step(cfg, model, lengths * 16, micro_batch_size=len(lengths))
    rows.compare("two-pass time", two, lambda: [one() for _ in range(16)])
    rows.compare_memory("two-pass memory", two, one)


def head(cfg, rows):
    """Measure the chunked cross-entropy over a large vocabulary against all logits at once."""
    d, dtype = cfg.stage().n_embd, torch.float32 if cfg.device == "cpu" else torch.bfloat16
    tokens = cfg.head_tokens * (1 if cfg.device == "cpu" else 16)      # more than a chunk of a card
    hidden, weight = (torch.randn(n, d, device=cfg.device, dtype=dtype).mul_(0.1).requires_grad_()
                      for n in (tokens, cfg.head_vocab))
    targets = torch.randint(0, cfg.head_vocab, (tokens,), device=cfg.device)

    def work(loss):
        loss(hidden, weight, targets).backward()
        hidden.grad = weight.grad = None

    sides = [partial(work, loss) for loss in (kernels.next_token_loss, next_token_loss)]
    rows.compare("head time", *sides)
    rows.compare_memory("head memory", *sides)


def profiles(cfg, rows):
    """Measure where a step and an encoding spend their time: a table, percent of each operation."""
    stage, texts, table = cfg.stage(), make_texts(cfg.texts, 2), {}
    plain, model = cfg.model(), cfg.model()
    windows = torch.randint(0, stage.vocab_size, (stage.batch_size, stage.passage_len + 1))
    batch = data.lm_batch(windows, None)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(cfg, folder, 256)
        work = {
            "plain LM step": step_of(plain, stage, "bfloat16",
                                     lambda: plain_lm_loss(plain, windows).backward()),
            "LM step": step_of(model, stage, "bfloat16",
                               lambda: train.step_loss(model, batch, stage, 0)),
            "fixed step": pair_step(cfg, cfg.model(), [64] * (2 * cfg.pairs)),
            **{f"encoding {dtype}": partial(Embedder(path, "cpu", dtype).encode, texts)
               for dtype in DTYPES}}
    for name, call in work.items():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            call()
        events = trace.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        for event in events:
            table.setdefault(event.key, {})[name] = 100 * event.self_cpu_time_total / total
    table = sorted(table.items(), key=lambda row: -max(row[1].values()))
    rows.keep("profile, percent of the time", [{"": key, **shares} for key, shares in table
                                               if max(shares.values()) >= 2])


# ---------------------------------------------------------------- the GPU

def soft_attention(cfg, rows, t=32_768):
    """Measure attention of one text at full length under the soft mask, forward and backward."""
    config, ops = ConanConfig(), kernels.pick(torch.device("cuda"))
    h, k, e = config.n_head, config.n_kv_head, config.head_dim
    leaf = torch.randn(t, h + 2 * k, e, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def work(mask):
        ops.attention(*leaf.split([h, k, k], dim=1), ops.prepare([t], mask, leaf)).sum().backward()
        leaf.grad = None

    sides = [partial(work, mask) for mask in (MaskSpec(0.3), FULL)]
    rows.compare("soft attention time", *sides)
    rows.compare_memory("soft attention memory", *sides)


# ---------------------------------------------------------------- what is printed and written

BOTH = {"encoding": encoding, "soft": soft_steps, "passes": passes, "head": head}
MEASUREMENTS = {
    "cpu": {"lm": lm, "growth": growth, "dhnm": dhnm, **BOTH,
            "profile": profiles, "fixed": partial(contrastive, name="fixed", longest=64, fixed=80),
            "real": partial(contrastive, name="real", longest=256, fixed=None)},
    "cuda": {**BOTH, "attention": soft_attention}}


def quartiles(values):
    """Write the spread of some values."""
    return "{:.3g} to {:.3g}".format(*np.percentile(values, (25, 75)))


class Rows:
    """The rows of a processor and recipe; what is measured again replaces its own row alone."""

    def __init__(self, cfg):
        self.cfg, self.name = cfg, f"bench_{'gpu' if cfg.device == 'cuda' else 'cpu'}"
        info, gpu = Path("/proc/cpuinfo"), cfg.device == "cuda"
        names = re.findall("model name\\s*: (.*)", info.read_text()) if info.is_file() else []
        chip = torch.cuda.get_device_name() if gpu else (names or [platform.machine()])[0]
        self.title = f"Speed, {cfg.device}, {chip}"
        self.command = f"python -m experiments.bench --device={cfg.device} --config={cfg.recipe}"
        self.machine = (f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
                        f"torch {torch.__version__}")
        path = Path(cfg.results) / f"{self.name}.json"
        before = read_object(path) if path.is_file() else {}
        is_same = (before.get("title"), before.get("command")) == (self.title, self.command)
        self.tables = before["tables"] if is_same else {}

    def compare(self, name, above, below, amount=None):
        """Measure two callables in turn, and keep the ratio of their seconds."""
        seconds = in_turn({"above": above, "below": below}, self.cfg.rounds, self.cfg.device)
        self.ratio(name, seconds["above"], seconds["below"], amount)

    def ratio(self, name, above, below, amount=None, **more):
        """Keep the ratios of paired seconds; amount: what is done in `below`."""
        more |= {"per second": amount / statistics.median(below)} if amount else {}
        self.add(name, [a / b for a, b in zip(above, below)], **more)

    def compare_memory(self, name, above, below):
        """Keep the ratio of the peak memory of two callables."""
        self.add(name, [peak_memory(above, self.cfg.device) / peak_memory(below, self.cfg.device)])

    def add(self, name, values, **more):
        """Keep and print the median of some values beside its floor and its goal."""
        start = max((key for key in GOALS if name.startswith(key)), key=len)
        (floor, goal), measured = GOALS[start], float(statistics.median(values))
        sign = 1 if goal >= floor else -1          # -1: less is better
        met = "goal" if sign * measured >= sign * goal else \
            "floor" if sign * measured >= sign * floor else "MISSED"
        row = {"": name, "measured": measured, "spread": quartiles(values), "floor": floor,
               "goal": goal, "met": met, **more, "load": os.getloadavg()[0]}
        print(f"{name:<40}{measured:>8.3g}  {row['spread']:<18}{met}", flush=True)
        self.keep("speed", [*(old for old in self.tables.get("speed", []) if old[""] != name), row])

    def keep(self, caption, rows):
        """Write everything; what is measured before an interruption is not lost."""
        self.tables[caption] = rows
        write_result(self.cfg.results, self.name, {
            "title": self.title, "command": self.command, "tables": self.tables,
            "notes": [f"Machine: {self.machine}.", *NOTES]})


def main(argv=None):
    """Take the measurements of a device, print each row beside its floor and goal, write them."""
    cfg = load_config(BenchConfig, argv)
    measurements = MEASUREMENTS[cfg.device]
    unknown = set(cfg.only) - measurements.keys()
    if unknown:
        raise ValueError(f"no such measurement: {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(measurements)}")
    distributed.start(cfg.device)                  # its allocator settings serve both sides
    torch.manual_seed(0)
    rows = Rows(cfg)
    print(rows.machine)
    for name in cfg.only or measurements:
        try:
            measurements[name](cfg, rows)
        except ImportError as error:
            print(f"{name}: left out, {error} (requirements-extras.txt)")
        except torch.OutOfMemoryError as error:        # the plain side needs more than the fast one
            print(f"{name}: left out, {error}")


if __name__ == "__main__":
    run_command(main)
