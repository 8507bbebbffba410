"""Intervals over seeds: Student's t, differences paired by seed."""
import math

import numpy as np


def t_quantile(df, level=0.95):
    """Return t with P(|T| < t) = level for Student's distribution of `df` degrees of freedom.

    With T = sqrt(df) tan(x) the density is cos(x)^(df - 1): integrated on a fine grid.

    >>> [round(t_quantile(df), 3) for df in (1, 4, 30)]
    [12.706, 2.776, 2.042]
    """
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (df - 1)
    mass = np.r_[0, np.cumsum(density[1:] + density[:-1])]
    return math.sqrt(df) * math.tan(float(np.interp(level * mass[-1], mass, x)))


def interval(values):
    """Return (mean, half the width of its 95 % interval), NaN for a single value."""
    values = np.asarray(list(values), dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), t_quantile(len(values) - 1) * float(
        values.std(ddof=1)) / math.sqrt(len(values))


def paired(ours, other):
    """Return the interval of ours[seed] - other[seed] over the seeds that both have."""
    return interval([ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())])


def shown(found, signed=False):
    """Write (mean, half) as "12.3 ± 0.4"; a difference that exceeds its interval in bold."""
    mean, half = found
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    text += "" if math.isnan(half) else f" ± {half:.1f}"
    return f"**{text}**" if signed and abs(mean) > half else text
