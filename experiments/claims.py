"""What Sec. 3.2 and 3.4 claim, looked at in the cells of Table 4 (experiments/lab.py).

    python -m experiments.tables sec32                 # trains what is missing of these cells
    python -m experiments.tables sec34

sec32: a model that is switched from the causal to the bidirectional mask at once "may initially
converge quickly" and "is prone to getting stuck". Loss and gradient norm after the switch, hard
against soft, from the same stage-2 checkpoint; and the rank of M, on which the argument rests,
beside the effective rank of the attention that the model makes of it.
sec34: hardness of negatives over time, replacements per query, and the time of a step, with the
first negatives kept (fixed) and with DHNM (dynamic).
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

import train
from data import load_collection
from embed import Embedder
from engine import checkpoint
from experiments.ablation import grid, name_4
from experiments.lab import COLUMNS, NONE, Cell, Lab, cell, seconds
from experiments.layout import write_files
from experiments.stats import interval, paired, shown
from mask import MaskSpec, effective_rank, mask_rank, soft_mask
from model import apply_rope
from train import STAGES

SFT, WEAK, SUP = STAGES[1:]
TEXT_TOKENS = 32                   # of the texts whose attention is looked at


# ---------------------------------------------------------------- Sec. 3.2: the switch

def smooth(values, width):
    """Return the mean of each value and the `width` - 1 before it."""
    return [float(np.mean(values[max(0, i + 1 - width):i + 1])) for i in range(len(values))]


def after_switch(log, chance):
    """Describe a stage 3 from its log: where the loss starts and ends, and whether it stands still.

    chance: the loss of a model that knows nothing, log of the batch. "longest_stand": the most
    steps in a row without a new minimum of the loss, smoothed over a twentieth of the stage. A loss
    that is never reached counts as reached at the end.
    """
    loss = smooth([row["loss"] for row in log], max(1, len(log) // 20))
    lows = np.minimum.accumulate(loss)
    new = [0, *(i for i in range(1, len(loss)) if lows[i] < lows[i - 1]), len(loss)]
    part = max(1, len(log) // 10)
    norm = [row["grad_norm"] for row in log]
    found = {"loss_at_step_1": log[0]["loss"], "loss_first_tenth": float(np.mean(
        [row["loss"] for row in log[:part]])), "loss_last_tenth": float(np.mean(
            [row["loss"] for row in log[-part:]])),
        "grad_norm_first_tenth": float(np.mean(norm[:part])),
        "grad_norm_last_tenth": float(np.mean(norm[-part:])),
        "longest_stand": int(max(np.diff(new)))}
    for share in (0.9, 0.75, 0.6):
        below = [i + 1 for i, x in enumerate(loss) if x < share * chance]
        found[f"step_at_{share:.0%}_of_chance"] = below[0] if below else len(log)
    return found


@torch.no_grad()
def attention_ranks(embedder, texts, n=TEXT_TOKENS):
    """Return (rank of M, its effective rank, that of the attention) on texts of n tokens each.

    The attention's is the mean over texts, layers and heads of the effective rank of softmax(q k^T
    / sqrt(E) + log M), at the alpha that the checkpoint was saved with.
    """
    model, mask, found = embedder.model, embedder.mask, []
    weights = soft_mask(n, mask.alpha, mask.axis)

    def look(layer, args):
        x, _, cos, sin = args
        heads = []
        for proj, count in ((layer.q_proj, layer.n_head), (layer.k_proj, layer.n_kv_head)):
            part = apply_rope(proj(x).view(len(x), count, -1), cos, sin)
            part = part.view(-1, n, count, layer.head_dim).transpose(1, 2)      # (B, H, T, E)
            heads.append(part.repeat_interleave(layer.n_head // count, dim=1))
        logits = heads[0].float() @ heads[1].float().transpose(-2, -1) / math.sqrt(layer.head_dim)
        probs = torch.softmax(logits.double() + weights.log().to(logits.device), dim=-1)
        found.extend(effective_rank(p) for p in probs.cpu().flatten(0, 1))

    hooks = [block.self_attn.register_forward_pre_hook(look) for block in model.layers]
    ids = [x[:n] for x in embedder.tokenizer.encode_batch(texts) if len(x) >= n]
    flat = torch.tensor([i for text in ids for i in text], device=embedder.device)
    try:
        model(flat, [n] * len(ids), mask)
    finally:
        for hook in hooks:
            hook.remove()
    return mask_rank(weights), effective_rank(weights), float(np.mean(found))


def sec32(cfg):
    """Compare hard and soft from the same stage-2 checkpoint; write results/sec32.json and .md."""
    lab, sides = Lab(cfg), {"hard": NONE, "soft": Cell()}
    lab.tune(())
    plan = list(sides.values())
    lab.train("sec32", cfg.seeds, plan, lambda seeds: None)
    chance = math.log(lab.base[WEAK].batch_size)
    texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in load_collection(
        lab.collections("test")[0]).corpus if len(row["text"]) > 400][:32]
    found = {side: {"curve": [], "switch": {}, "ranks": {}} for side in sides}
    for side, one in sides.items():
        logs = {seed: lab.log(seed, one, WEAK) for seed in cfg.seeds}
        steps = len(logs[cfg.seeds[0]])
        for first in range(0, steps, max(1, steps // 15)):
            part = slice(first, first + max(1, steps // 15))
            found[side]["curve"].append({"from_step": first + 1, **{
                key: interval([np.mean([row[key] for row in log[part]]) for log in logs.values()])
                for key in ("alpha", "loss", "grad_norm")}})
        for seed, log in logs.items():
            found[side]["switch"][seed] = after_switch(log, chance)
            found[side]["ranks"][seed] = stage_ranks(lab, seed, one, texts)
    found |= {"scale": lab.scale, "seeds": list(cfg.seeds), "chance": chance,
              "versions": train.versions(), "after_stage_3": {side: {
                  seed: lab.read(seed, one, WEAK) for seed in cfg.seeds}
                  for side, one in sides.items()}}
    return write_files(cfg, "sec32", found, "\n".join(sec32_lines(found)))


def stage_ranks(lab, seed, one, texts):
    """Return [{step, alpha, rank ..}] of stage 2's end and of the checkpoints of stage 3."""
    rows, weak = [], lab.config(seed, WEAK, one)
    before = checkpoint.latest(Path(lab.config(seed, SFT).run_dir))
    for path in [before, *sorted(weak.run_dir.glob("step_*"))]:
        embedder = Embedder(path, dtype="float32")
        step = embedder.meta["step"] if path != before else 0
        if path == before and one == NONE:         # what the switch does before a step is taken
            embedder.mask = MaskSpec()
        of_mask, smooth_of_mask, realised = attention_ranks(embedder, texts)
        rows.append({"step": step, "alpha": embedder.mask.alpha, "rank_of_M": of_mask,
                     "effective_rank_of_M": smooth_of_mask, "attention": realised})
    return rows


def sec32_lines(found):
    """Return Sec. 3.2's claims in Markdown."""
    seeds = found["seeds"]
    lines = ["# Sec. 3.2: does the hard switch get stuck?", "",
             f"Stage 3 from the same stage-2 checkpoint, seeds {', '.join(map(str, seeds))}; mean "
             "and 95 % interval; differences paired by seed, bold where they exceed it. A model "
             f"that knows nothing has the loss {found['chance']:.2f}.", ""]
    keys = list(found["hard"]["switch"][seeds[0]])
    rows = []
    for key in keys:
        hard, soft = ({s: found[side]["switch"][s][key] for s in seeds}
                      for side in ("hard", "soft"))
        rows.append([key.replace("_", " "), *(f"{m:.2f} ± {h:.2f}" for m, h in (
            interval(hard.values()), interval(soft.values()))), signed(paired(soft, hard))])
    scores = found["after_stage_3"]
    for column in COLUMNS:
        hard, soft = ({s: scores[side][s][column] for s in seeds} for side in ("hard", "soft"))
        rows.append([f"{column} after stage 3", shown(interval(hard.values())),
                     shown(interval(soft.values())), shown(paired(soft, hard), True)])
    lines += grid(["", "hard", "soft", "soft - hard"], rows)
    lines += ["Loss and gradient norm, a fifteenth of the stage in each row:", ""]
    lines += grid(["from step", "alpha (soft)", "loss hard", "loss soft", "gradient hard",
                   "gradient soft"], [
        [a["from_step"], f"{b['alpha'][0]:.2f}",
         *(f"{x[key][0]:.2f} ± {x[key][1]:.2f}" for key in ("loss", "grad_norm") for x in (a, b))]
        for a, b in zip(found["hard"]["curve"], found["soft"]["curve"])])
    lines += [f"Rank of M for {TEXT_TOKENS} tokens, and the effective rank of the attention that "
              "the model makes of it (mean over texts, layers and heads):", ""]
    ranks = [(side, [found[side]["ranks"][s][i] for s in seeds]) for side in ("hard", "soft")
             for i in range(len(found[side]["ranks"][seeds[0]]))]
    return lines + grid(["", "step", "alpha", "rank of M", "effective rank of M", "attention"], [
        [side, at[0]["step"], f"{at[0]['alpha']:.2f}", at[0]["rank_of_M"],
         f"{at[0]['effective_rank_of_M']:.1f}",
         "{:.2f} ± {:.2f}".format(*interval([row["attention"] for row in at]))]
        for side, at in ranks])


def signed(found):
    """Write a difference with two decimals, bold where it exceeds its interval."""
    text = f"{found[0]:+.2f} ± {found[1]:.2f}"
    return f"**{text}**" if abs(found[0]) > found[1] else text


# ---------------------------------------------------------------- Sec. 3.4: hard negatives

def hardness(log, parts=5):
    """Return {task: [{"S", "S_0", "replaced", "exhausted", "loss"} of each fifth of a stage 4]}."""
    found = {}
    for task in sorted({row["task"] for row in log if "S" in row}):
        rows = [row for row in log if row["task"] == task and "S" in row]
        found[task] = [{key: float(np.mean([row[key] for row in part])) for key in
                        ("S", "S_0", "replaced", "exhausted", "loss")} for part in
                       (rows[i * len(rows) // parts:(i + 1) * len(rows) // parts]
                        for i in range(parts))]
    return found


def changes_of(lab, seed, one, task="retrieval"):
    """Return the mean number of replacements of a visited query, and the share with none."""
    where = lab.config(seed, SUP, one).run_dir / "eval.json"
    counts = {int(key.split("_")[-2]): value for key, value in json.loads(
        where.read_text(encoding="utf-8")).items() if key.startswith(f"dhnm/{task}/")}
    total = sum(counts.values())
    return {"replaced_each": sum(k * v for k, v in counts.items()) / total,
            "untouched": counts.get(0, 0) / total}


def sec34(cfg):
    """Compare fixed and dynamic negatives in Table 4's cells; write results/sec34.json and .md."""
    lab = Lab(cfg)
    lab.tune(())
    sides = {f"{name_4((1, c, 0))} {'fixed' if not d else 'dynamic'}": cell(True, bool(c), bool(d))
             for c in (0, 1) for d in (0, 1)}
    lab.train("sec34", cfg.seeds, list(sides.values()), lambda seeds: None)
    found = {"scale": lab.scale, "seeds": list(cfg.seeds), "versions": train.versions(),
             "cells": {side: {
                 "hardness": {seed: hardness(lab.log(seed, one)) for seed in cfg.seeds},
                 "changes": {seed: changes_of(lab, seed, one) for seed in cfg.seeds},
                 "seconds_of_a_step": {seed: float(np.median(seconds(lab.log(seed, one))))
                                       for seed in cfg.seeds}} for side, one in sides.items()}}
    return write_files(cfg, "sec34", found, "\n".join(sec34_lines(found)))


def sec34_lines(found):
    """Return Sec. 3.4's claims in Markdown."""
    seeds, cells = found["seeds"], found["cells"]
    lines = ["# Sec. 3.4: do negatives stay hard when they are replaced?", "",
             f"Stage 4, retrieval queries, seeds {', '.join(map(str, seeds))}; mean and 95 % "
             "interval; differences paired by seed, bold where they exceed it. S: cosine of a "
             "query and its negatives in use; S_0: the same at their first use.", ""]
    for with_clr in ("SM", "SM+CLR"):
        pair = [cells[f"{with_clr} {kind}"] for kind in ("fixed", "dynamic")]
        lines += [f"{with_clr}, each fifth of stage 4:", ""]
        rows = []
        for i in range(5):
            of = [{key: {s: side["hardness"][s]["retrieval"][i][key] for s in seeds}
                   for key in ("S", "S_0", "replaced", "exhausted")} for side in pair]
            rows.append([i + 1, *("{:.3f}".format(interval(x[key].values())[0])
                                  for key in ("S_0", "S") for x in of),
                         "{:+.3f} ± {:.3f}".format(*paired(of[1]["S"], of[0]["S"])),
                         *(f"{interval(of[1][key].values())[0]:.1f}"
                           for key in ("replaced", "exhausted"))])
        lines += grid(["fifth", "S_0 fixed", "S_0 dynamic", "S fixed", "S dynamic", "difference",
                       "replaced a step", "queries without a pool left"], rows)
    rows = []
    for side, entry in cells.items():
        each, none = (interval([entry["changes"][s][k] for s in seeds])
                      for k in ("replaced_each", "untouched"))
        other = cells[side.replace("dynamic", "fixed")]["seconds_of_a_step"]
        ratio = interval([entry["seconds_of_a_step"][s] / other[s] for s in seeds])
        rows.append([side, "{:.2f} ± {:.2f}".format(*each), f"{none[0]:.0%}",
                     "{:.3f} ± {:.3f}".format(*ratio)])
    return lines + grid(["", "replacements a query", "queries without any",
                         "time of a step over fixed"], rows)
