"""The soft mask: attention that walks from causal to bidirectional (PAPER Sec. 3.2, App. C).

    Eq. (3)   alpha(t) = t / tau                       tau: total steps, so `total_steps` here
    Eq. (4)   M_ij = 1 if i >= j else min(alpha * l / i, 1)     l: the text's own length, i from 1

    python mask.py                                     # the table: step, alpha, rank, the law

UNSPECIFIED: how M enters attention. Here softmax(logits + log M): M weighs exp(logits), so alpha 0
is exactly causal and alpha 1 exactly bidirectional. `apply="logits"`, softmax(logits * M), is one
published reading. It is not causal at alpha 0 and stays for the comparison.
UNSPECIFIED: l is "the training sequence length". With each text's own length an embedding does not
depend on the text's batch.
DEVIATES: the formula divides by the row i, the prose speaks of columns: `axis="row" | "col"`.
"""
import itertools
import math
from dataclasses import dataclass

import torch

KINDS = ("linear", "accelerating", "decelerating")


def alpha(step, total_steps, kind="linear"):
    """Return the openness of the mask at `step` of `total_steps`, a float in [0, 1].

    PAPER Eq. 3, App. C: t -> step, tau -> total_steps (the paper's other tau is the temperature).
    With x = t / tau: linear x, accelerating x^2, decelerating 1 - (1 - x)^2. Steps past the end
    stay at 1. Raises ValueError for an unknown kind or a negative step.

    >>> [alpha(t, 4) for t in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if kind not in KINDS:
        raise ValueError(f"schedule {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if step < 0 or total_steps < 0:
        raise ValueError(f"step {step} and total_steps {total_steps} must not be negative")
    x = min(step / total_steps, 1.0) if total_steps else 1.0
    return {"linear": x, "accelerating": x * x, "decelerating": 1 - (1 - x) ** 2}[kind]


def soft_mask(seq_len, alpha, axis="row"):
    """Return M, (T, T) float64 in [0, 1], for one text of `seq_len` tokens.

    PAPER Eq. 4: l -> seq_len. M_ij is how much query token i sees of key token j.
    Raises ValueError for an alpha outside [0, 1] or an unknown axis.

    >>> soft_mask(3, 0.5)                              # row 1: min(0.5 * 3 / 1, 1) = 1
    tensor([[1.0000, 1.0000, 1.0000],
            [1.0000, 1.0000, 0.7500],
            [1.0000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    MaskSpec(alpha, axis)                              # checks both
    i, length = torch.arange(seq_len).double(), torch.tensor(seq_len).double()
    return mask_weights(i[:, None], i, length, alpha, axis)


def mask_weights(row, col, length, alpha, axis="row"):
    """Return M of Eq. (4) for broadcastable 0-based `row`, `col` and `length` tensors."""
    future = future_weight(row if axis == "row" else col, length, alpha)
    return torch.where(row >= col, torch.ones_like(future), future)


def future_weight(position, length, alpha):
    """Return min(alpha * l / i, 1) of tokens at a 0-based `position` of texts of `length`."""
    return (alpha * length / (position + 1)).clamp(max=1.0)    # PAPER Eq. 4: i counts from 1


@dataclass(frozen=True)
class MaskSpec:
    """The mask of one forward pass; a model knows nothing of steps and schedules."""
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

    PAPER Sec. 3.2: N for the causal mask, 1 for the bidirectional one. It is the rank of M, not of
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

    k = floor(alpha * N) rows (columns) are all ones and count once. The last row is all ones by
    itself, and it is not one of the k. The first column is, and it is one of them: so columns have
    one rank more. The prose's "first i columns -> N - i" is off by one. N at k = 0, 1 at k = N.
    """
    MaskSpec(alpha, axis)                              # checks both
    k = math.floor(alpha * seq_len + 1e-9)             # 0.29 * 100 is 28.999999999999996
    if k == 0:
        return seq_len
    return 1 if k >= seq_len else seq_len - k + (axis == "col")


def main():
    """Print the rank along all three schedules, in both readings, beside the law."""
    n = 64
    print(f"M of Eq. (4) for a text of N = {n} tokens; law: N - floor(alpha N), one more for "
          "columns; N at alpha 0, 1 at alpha 1\n\n"
          "schedule      axis step   alpha  rank   law  effective rank")
    for kind, axis, step in itertools.product(KINDS, ("row", "col"), range(9)):
        a = alpha(step, 8, kind)
        m = soft_mask(n, a, axis)
        print(f"{kind:<13} {axis:<4} {step:>4} {a:>7.4f} {mask_rank(m):>5} "
              f"{rank_law(n, a, axis):>5} {effective_rank(m):>15.2f}")


if __name__ == "__main__":
    main()
