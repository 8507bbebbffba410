"""Measure speed: ratios within one run, the two sides in turn, medians of several rounds.

    python -m experiments.bench                     # a few minutes on an idle machine
    python -m experiments.bench --rounds=9 --out=results/bench_cpu.json

Made-up words, real lengths (log-normal, as documentation has). Absolute figures depend on the
machine; the ratios are what to quote. Every fast path here is held equal to the plain one by a test
(test_model.py, test_losses.py).
"""
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configurator import load_config
from engine import distributed
from losses import cached_backward, info_nce, lm_cross_entropy
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `python -m experiments.bench`."""
    rounds: int = 5                # times that each side is measured
    pairs: int = 128               # texts of a step: as many queries and as many passages
    out: str = ""                  # JSON file to write
    n_embd: int = 512              # shape of the model: the laptop's
    ffn_dim: int = 128
    n_layer: int = 1
    vocab_size: int = 16384


def real_lengths(n, mean, longest, rng):
    """Return n token counts, log-normal with this mean before the cut at `longest`."""
    draw = rng.lognormal(np.log(mean) - 0.32, 0.8, n)
    return [int(x) for x in np.clip(draw, 3, longest)]


def in_turn(sides, rounds):
    """Return {name: median seconds} of some callables, called in turn `rounds` times."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if turn:                               # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_step(model, ids, lengths, mask=FULL, dtype="bfloat16", chunks=1):
    """Run forward, InfoNCE and backward of one batch of pairs; `chunks` > 1: the two-pass step."""
    b, ends = len(lengths) // 2, np.cumsum([0, *lengths])
    cuts = np.linspace(0, len(lengths), chunks + 1).astype(int)
    parts = [(ids[ends[i]:ends[j]], lengths[i:j]) for i, j in zip(cuts, cuts[1:])]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        cached_backward(lambda part: model(*part, mask), parts,
                        lambda x: info_nce(x[:b], x[b:], temperature=0.05)[0])
    model.zero_grad(set_to_none=True)


def naive_cross_entropy(hidden, weight, targets):
    """Hold all logits at once, as most training scripts do."""
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets)


def main(argv=None):
    """Measure everything, print the ratios, and write them."""
    cfg = load_config(BenchConfig, argv)
    distributed.start("cpu")
    distributed.seed_everything(0)
    rng, found = np.random.default_rng(0), {}
    model = Conan(ConanConfig(vocab_size=cfg.vocab_size, n_layer=cfg.n_layer, n_head=8,
                              n_kv_head=4, n_embd=cfg.n_embd, ffn_dim=cfg.ffn_dim,
                              block_size=256)).init_weights()
    lengths = real_lengths(cfg.pairs, 14, 48, rng) + real_lengths(cfg.pairs, 80, 256, rng)
    ids = torch.randint(0, cfg.vocab_size, (sum(lengths),))
    padded = [max(lengths)] * len(lengths)         # what a padded batch makes the layers compute
    all_ids = torch.randint(0, cfg.vocab_size, (sum(padded),))
    found["step, seconds"] = in_turn({
        "packed bfloat16": lambda: training_step(model, ids, lengths),
        "packed float32": lambda: training_step(model, ids, lengths, dtype="float32"),
        "padded bfloat16": lambda: training_step(model, all_ids, padded),
        "causal": lambda: training_step(model, ids, lengths, CAUSAL),
        "soft mask": lambda: training_step(model, ids, lengths, MaskSpec(0.3)),
        "two-pass, 8 chunks": lambda: training_step(model, ids, lengths, chunks=8),
    }, cfg.rounds)
    hidden = torch.randn(1024, cfg.n_embd).bfloat16().requires_grad_()
    weight = (torch.randn(50_000, cfg.n_embd) * 0.02).requires_grad_()
    targets = torch.randint(0, 50_000, (1024,))
    found["cross-entropy over 50,000 words, seconds"] = in_turn({
        "chunked": lambda: lm_cross_entropy(hidden, weight, targets, 256).backward(),
        "naive": lambda: naive_cross_entropy(hidden, weight, targets).backward(),
    }, cfg.rounds)
    step = found["step, seconds"]
    base = step["packed bfloat16"]
    found["ratios"] = {f"{name} / packed bfloat16": value / base for name, value in step.items()}
    head = found["cross-entropy over 50,000 words, seconds"]
    found["ratios"]["chunked / naive cross-entropy"] = head["chunked"] / head["naive"]
    found["tokens per second, packed bfloat16"] = sum(lengths) / base
    found["padding share of a padded batch"] = 1 - sum(lengths) / sum(padded)
    found["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__,
                        "load": os.getloadavg()[0]}
    print(json.dumps(found, indent=1))
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
