"""The order of examples as a pure function of (seed, epoch, place): a resumed run needs no state.

The task of a step depends on (seed, step) only, so all ranks draw the same one. Nothing here holds
a list of the examples: a billion rows cost no memory.
"""
import numpy as np


def mix(x, key):
    """Hash uint64 arrays with a key (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        x = (np.asarray(x, dtype=np.uint64) + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key_of(seed):
    """Return a seed's key for `mix`. Near seeds have far keys: epoch 1 of seed 0 is no other's."""
    return seed * 0xD1342543DE82EF95 % 2 ** 64


def shuffled(positions, n, seed):
    """Map endless positions (int64 array) to example indices: each epoch is a permutation of n.

    A four-round Feistel network on the epoch's number and the place in it. Where its value is
    beyond n, the walk continues until it falls below.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    epoch, x = positions // np.uint64(n), positions % np.uint64(n)
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    key = mix(epoch, key_of(seed))
    beyond = np.ones(x.shape, dtype=bool)
    while beyond.any():
        left, right = x >> np.uint64(half), x & low
        for number in range(4):
            left, right = right, left ^ (mix(right ^ key, number) & low)
        x = np.where(beyond, (left << np.uint64(half)) | right, x)
        beyond = x >= n
    return x.astype(np.int64)


def task_of_step(steps, weights, seed):
    """Return (the task of each step, how often it came before): two int64 arrays.

    Tasks are drawn by weight, from (seed, step) only. The second needs all `steps` from 0 on.
    """
    edges = np.cumsum(np.asarray(weights, dtype=np.float64))
    key = int(mix([seed], 0x7A5C)[0])                  # near seeds, far draws
    draw = mix(steps, key) / 2.0 ** 64
    task = np.searchsorted(edges / edges[-1], draw, side="right").clip(max=len(weights) - 1)
    visit = np.empty_like(task)
    for number in range(len(weights)):
        visit[task == number] = np.arange(np.count_nonzero(task == number))
    return task, visit


def choice(n, seed, epoch, row):
    """Return one of 0 .. n - 1 for a row, drawn anew in each epoch."""
    key = int(mix([epoch], key_of(seed))[0])
    return int(mix([row], key)[0] % np.uint64(n))
