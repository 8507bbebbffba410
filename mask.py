"""The soft mask: attention that walks from causal to bidirectional (PAPER Sec. 3.2, App. C).

    Eq. (3)   alpha(t) = t / tau                       tau: total steps, so `total_steps` here
    Eq. (4)   M_ij = 1 if i >= j else min(alpha * l / i, 1)     l: the text's own length, i from 1

    python mask.py                                     # the table: step, alpha, rank, the law
    python mask.py --figure=results/figures/soft_mask.png

UNSPECIFIED: how M enters attention. Here softmax(logits + log M): M weighs exp(logits), so alpha 0
is exactly causal and alpha 1 exactly bidirectional. `apply="logits"`, softmax(logits * M), is one
published reading; it is not causal at alpha 0 and is kept for the comparison.
UNSPECIFIED: l is "the training sequence length". Each text's own length makes an embedding
independent of what it was padded to.
DEVIATES: the formula divides by the row i, the prose speaks of columns: `axis="row" | "col"`.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

KINDS = ("linear", "accelerating", "decelerating")


def alpha(step, total_steps, kind="linear"):
    """Return the openness of the mask at `step` of `total_steps`, a float in [0, 1].

    Paper: Eq. (3) and App. C; t -> step, tau -> total_steps (the paper's other tau is the
    temperature). With x = t / tau: linear x, accelerating x^2, decelerating 1 - (1 - x)^2.
    Steps past the end stay at 1.  Raises ValueError for an unknown kind or a negative step.

    >>> [alpha(t, 4) for t in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if kind not in KINDS:
        raise ValueError(f"schedule {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if step < 0 or total_steps < 0:
        raise ValueError(f"step {step} and total_steps {total_steps} must not be negative")
    x = min(step / total_steps, 1.0) if total_steps else 1.0
    return {"linear": x, "accelerating": x * x, "decelerating": 1 - (1 - x) ** 2}[kind]


def mask_weights(row, col, length, alpha, axis="row"):
    """Return M of Eq. (4) for broadcastable 0-based `row`, `col` and `length` tensors.

    The one place where Eq. (4) is written; every attention path calls it with its own indices.
    """
    if axis not in ("row", "col"):
        raise ValueError(f"axis {axis!r} is unknown; choose row (the formula) or col (the prose)")
    future = future_weight(row if axis == "row" else col, length, alpha)
    return torch.where(row >= col, torch.ones_like(future), future)


def future_weight(at, length, alpha):
    """Return min(alpha * l / i, 1) of tokens at the 0-based place `at` of texts of `length`."""
    return (alpha * length / (at + 1)).clamp(max=1.0)  # PAPER Eq. 4: i counts from 1


def soft_mask(seq_len, alpha, axis="row"):
    """Return M, (T, T) float64 in [0, 1], for one text of `seq_len` tokens.

    Paper: Eq. (4); l -> seq_len. M_ij is how much query token i sees of key token j.
    Raises ValueError unless 0 <= alpha <= 1 and seq_len >= 1.

    >>> soft_mask(3, 0.5)                              # row 1: min(0.5 * 3 / 1, 1) = 1
    tensor([[1.0000, 1.0000, 1.0000],
            [1.0000, 1.0000, 0.7500],
            [1.0000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, not {seq_len}")
    at = torch.arange(seq_len, dtype=torch.float64)
    return mask_weights(at[:, None], at[None, :], torch.tensor(float(seq_len)).double(), alpha,
                        axis)


def attention_bias(weights, pad=None):
    """Return log M to be added to the attention logits, with padding closed.

    weights: (T, T) or (B, T, T) in [0, 1]. pad: (B, T) bool, True = token. Returns (T, T) without
    `pad`, else (B, 1, T, T). log 0 = -inf is harmless, as a token always sees itself. Rows of pads
    are set to 0: their output is never read, and a row of nothing but -inf would be NaN.
    """
    bias = torch.log(weights)
    if pad is None:
        return bias if bias.dim() == 2 else bias[:, None]
    bias = bias.expand(len(pad), *bias.shape[-2:])                          # (B, T, T)
    bias = bias.masked_fill(~pad[:, None, :], -torch.inf)                   # keys that are pads
    return bias.masked_fill(~pad[:, :, None], 0.0)[:, None]                 # (B, 1, T, T)


@dataclass(frozen=True)
class MaskSpec:
    """What a model is told of the mask; it knows nothing of steps and schedules.

    alpha 0 (causal) and alpha 1 (bidirectional) need no mask tensor: fast kernels stay in use.
    """
    alpha: float = 1.0
    axis: str = "row"              # "row": Eq. (4) as printed; "col": as the prose has it
    apply: str = "weights"         # "weights": logits + log M; "logits": logits * M

    def __post_init__(self):
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], not {self.alpha}")
        if self.axis not in ("row", "col"):
            raise ValueError(f"axis {self.axis!r} is unknown; choose row or col")
        if self.apply not in ("weights", "logits"):
            raise ValueError(f"apply {self.apply!r} is unknown; choose weights or logits")

    @property
    def is_full(self):
        """Whether every token sees every token (M = 1 everywhere, in either reading)."""
        return self.alpha == 1.0

    @property
    def is_causal(self):
        """Whether no token sees a later one; never so for `apply="logits"` (see above)."""
        return self.alpha == 0.0 and self.apply == "weights"


CAUSAL = MaskSpec(alpha=0.0)
FULL = MaskSpec(alpha=1.0)


# ---------------------------------------------------------------- rank: Sec. 3.2's argument

def mask_rank(weights):
    """Return the rank of M as a real matrix, computed in float64.

    Paper: Sec. 3.2; N for the causal mask, 1 for the bidirectional one. It is the rank of M, not of
    the softmaxed attention and not of log M.
    """
    return int(torch.linalg.matrix_rank(weights.double()))


def effective_rank(weights):
    """Return exp(entropy of the normalised singular values), a float in [1, N].

    A smooth companion of `mask_rank`: it also sees that a mask is *nearly* of low rank.
    """
    sigma = torch.linalg.svdvals(weights.double())
    p = sigma / sigma.sum()
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-300))).sum()))


def rank_law(seq_len, alpha, axis="row"):
    """Return the rank that Eq. (4) must have: N - k for rows, N - k + 1 for columns.

    k = floor(alpha * N) rows (columns) are all ones and count once. In the row reading the last
    row is all ones by itself, in the column reading the first column is: hence the difference,
    and why the prose's "first i columns -> N - i" is off by one. Ends: N at k = 0, 1 at k = N.
    """
    k = math.floor(alpha * seq_len + 1e-9)             # 0.29 * 100 is 28.999999999999996
    if k == 0:
        return seq_len
    return 1 if k >= seq_len else seq_len - k + (axis == "col")


def rank_table(seq_len=64, rows=9):
    """Yield (kind, axis, step, alpha, rank, law, effective rank) along all three schedules."""
    for kind in KINDS:
        for axis in ("row", "col"):
            for step in range(rows):
                a = alpha(step, rows - 1, kind)
                m = soft_mask(seq_len, a, axis)
                yield (kind, axis, step, a, mask_rank(m), rank_law(seq_len, a, axis),
                       effective_rank(m))


def draw(path, seq_len=64):
    """Draw the mask at five alphas, and rank against step, into the PNG file `path`."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise SystemExit(f"the figure needs matplotlib (pip install matplotlib): {error}")
    figure, axes = plt.subplots(1, 6, figsize=(15, 2.9), width_ratios=[1] * 5 + [1.5],
                                layout="constrained")
    for ax, a in zip(axes, (0.0, 0.1, 0.25, 0.5, 1.0)):
        m = soft_mask(seq_len, a)
        ax.imshow(m.numpy(), vmin=0, vmax=1, cmap="viridis")
        ax.set(xticks=[], yticks=[], title=f"alpha {a:g}, rank {mask_rank(m)}")
    axes[0].set(xlabel="key token j", ylabel="query token i")
    steps = range(seq_len + 1)
    for kind, style in zip(KINDS, ("-", "--", ":")):
        ranks = [mask_rank(soft_mask(seq_len, alpha(t, seq_len, kind))) for t in steps]
        axes[-1].plot(steps, ranks, style, label=kind)
    axes[-1].set(xlabel="step", ylabel=f"rank of M (N = {seq_len})")
    axes[-1].legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    """Print the rank table and, with `--figure`, draw it."""
    parser = argparse.ArgumentParser(description="the soft mask, its schedules and its rank")
    parser.add_argument("--seq_len", type=int, default=64, help="tokens in the text (N)")
    parser.add_argument("--figure", help="also draw into this PNG file (needs matplotlib)")
    args = parser.parse_args()
    print(f"M of Eq. (4) for a text of N = {args.seq_len} tokens; law: N - floor(alpha N), "
          "one more for columns\n")
    print(f"{'schedule':<13} {'axis':<4} {'step':>4} {'alpha':>7} {'rank':>5} {'law':>5} "
          f"{'effective rank':>15}")
    for kind, axis, step, a, rank, law, effective in rank_table(args.seq_len):
        print(f"{kind:<13} {axis:<4} {step:>4} {a:>7.4f} {rank:>5} {law:>5} {effective:>15.2f}"
              + ("" if rank == law else "   <- not the law"))
    if args.figure:
        draw(args.figure, args.seq_len)
        print(f"\nwrote {args.figure}")


if __name__ == "__main__":
    main()
