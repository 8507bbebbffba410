"""Dynamic hard negative mining: negatives that got easy are replaced while training runs.

PAPER Sec. 3.4, Eq. (5) and (6). S = cos(f(q), f(n)) comes free from the loss; S_0 is the score at a
negative's first use. A negative leaves if S_0 < 0.4 at its first use, or if later 1.2 * S < S_0 and
|S| < 0.7. A marked negative is replaced at once by the next of the query's ordered pool, that is
before the query's next visit: with a single pass over the data nothing is ever used twice, so
several epochs are needed for this to act at all.

UNSPECIFIED: S_0 of a negative that was swapped in (here: its own first score, and the 0.4 rule
holds for it too); an exhausted pool (here: keep the hardest one seen, and count it); the absolute
value stands in the prose but not in the formula (`absolute=False` is the formula).
`policy="v1"` is the rule of Conan-Embedding v1: every `every` steps, 1.15 and 0.8, on
the mean over the query's negatives, all of which are then replaced.
"""
import torch


def should_replace(initial, current, *, floor=0.4, decay=1.2, ceiling=0.7, absolute=True):
    """Tell which negatives have become easy: bool, of the inputs' broadcast shape.

    Paper: Eq. (6); S_0 -> initial, S_i -> current, cosines. At a first use both are the same, and
    only the floor can speak: decay * S < S needs a negative S, which the floor covers already.

    >>> should_replace(torch.tensor([0.39, 0.6, 0.9]), torch.tensor([0.39, 0.49, 0.72]))
    tensor([ True,  True, False])
    """
    level = current.abs() if absolute else current
    return (initial < floor) | ((decay * current < initial) & (level < ceiling))


class HardNegativePool:
    """Each query's ordered candidates, which of them are in use, and their cached scores.

    candidates: one list of candidate ids for each query, hardest first, of any lengths (also empty)
    or a (Q, P) int64 tensor padded with -1. All state is CPU tensors: Q queries, P candidates,
    N slots (negatives in use for each query).

    >>> pool = HardNegativePool([[7, 8, 9]], n_negatives=2)
    >>> pool.negatives([0])
    tensor([[7, 8]])
    >>> pool.update([0], torch.tensor([[0.5, 0.1]]))        # 0.1 < 0.4: too easy from the start
    >>> pool.negatives([0])
    tensor([[7, 9]])
    """

    def __init__(self, candidates, n_negatives=7, *, policy="v2", every=100, floor=0.4,
                 decay=1.2, ceiling=0.7, absolute=True):
        if n_negatives < 1:
            raise ValueError(f"n_negatives must be at least 1, not {n_negatives}")
        if policy not in ("v2", "v1", "fixed"):
            raise ValueError(f"policy {policy!r} is unknown; choose v2, v1 or fixed")
        self.policy, self.every = policy, every
        self.rule = dict(floor=floor, decay=decay, ceiling=ceiling, absolute=absolute)
        self.n_negatives = n_negatives
        self.refill(candidates)

    def refill(self, candidates):
        """Start over with new candidates (`remine_every`): every slot and score is fresh."""
        if not torch.is_tensor(candidates):
            width = max([self.n_negatives, *map(len, candidates)])
            table = torch.full((len(candidates), width), -1, dtype=torch.int64)
            for row, ids in zip(table, candidates):
                row[:len(ids)] = torch.as_tensor(list(ids), dtype=torch.int64)
            candidates = table
        if candidates.shape[1] == 0:                                        # no query has any
            candidates = torch.full((len(candidates), 1), -1, dtype=torch.int64)
        self.candidates = candidates                                        # (Q, P) ids, -1 none
        q, n = len(candidates), self.n_negatives
        self.available = (candidates != -1).sum(1)                          # (Q,)
        place = torch.arange(n).repeat(q, 1)
        self.slots = torch.where(place < self.available[:, None], place, -1)    # (Q, N) places
        self.next = self.available.clamp(max=n)                             # (Q,) first unused one
        self.initial = torch.full((q, n), torch.nan)                        # (Q, N) S_0
        self.last = torch.full(candidates.shape, torch.nan)                 # (Q, P) last score
        self.visits = torch.zeros(q, dtype=torch.int64)
        self.looked = torch.zeros(q, dtype=torch.int64)                     # v1: at which step last
        self.steps = torch.zeros((), dtype=torch.int64)
        self.changes = torch.zeros(q, dtype=torch.int64)                    # replacements so far
        self.exhausted = torch.zeros(q, dtype=torch.bool)
        self._step = {"replaced": 0, "exhausted": 0, "S": 0.0, "S_0": 0.0}

    def __len__(self):
        return len(self.candidates)

    def negatives(self, query_ids):
        """Return the ids in use for these queries, (B, N) int64; -1 where the pool is too small."""
        query_ids = torch.as_tensor(query_ids, dtype=torch.int64)
        place = self.slots[query_ids]                                       # (B, N)
        ids = self.candidates[query_ids].gather(1, place.clamp(min=0))
        return torch.where(place < 0, -1, ids)

    def update(self, query_ids, scores):
        """Take the cosines (B, N) that the loss has just seen, and replace what got easy.

        Raises ValueError for scores of another shape or not finite, or a query that comes twice.
        Scores of empty places are ignored.
        """
        query_ids = torch.as_tensor(query_ids, dtype=torch.int64)
        scores = scores.detach().float().cpu()
        if scores.shape != (len(query_ids), self.n_negatives):
            raise ValueError(f"scores {tuple(scores.shape)} do not fit {len(query_ids)} queries "
                             f"with {self.n_negatives} negatives")
        if len(query_ids.unique()) != len(query_ids):
            raise ValueError(f"a query comes twice in {query_ids.tolist()}")
        used = self.slots[query_ids] >= 0                                   # (B, N)
        if not torch.isfinite(scores[used]).all():
            raise ValueError("a negative's score is not a finite number")
        scores = scores.masked_fill(~used, 0.0)
        first = self.initial[query_ids].isnan()
        initial = torch.where(first, scores, self.initial[query_ids])       # S_0: the first score
        self.initial[query_ids] = torch.where(used, initial, torch.nan)
        self.visits[query_ids] += 1
        self.steps += 1
        b, n = used.nonzero(as_tuple=True)
        self.last[query_ids[b], self.slots[query_ids[b], n]] = scores[b, n]
        marked = used & self._marked(query_ids, initial, scores, used)
        replaced = self._replace(query_ids, marked)
        count = max(int(used.sum()), 1)
        self._step = {"replaced": replaced, "exhausted": int(self.exhausted.sum()),
                      "S": float(scores[used].sum()) / count,
                      "S_0": float(initial[used].sum()) / count}

    def _marked(self, query_ids, initial, scores, used):
        if self.policy == "fixed":
            return torch.zeros_like(used)
        if self.policy == "v2":
            return should_replace(initial, scores, **self.rule)
        # v1: looks at a query every k steps, at its average, and changes all or nothing
        count = used.sum(1, keepdim=True).clamp(min=1)
        mean_0 = (initial * used).sum(1, keepdim=True) / count              # (B, 1)
        mean = (scores * used).sum(1, keepdim=True) / count
        due = (self.steps - self.looked[query_ids] >= self.every)[:, None]  # (B, 1)
        self.looked[query_ids] = torch.where(due[:, 0], self.steps, self.looked[query_ids])
        return (due & (1.15 * mean < mean_0) & (mean.abs() < 0.8)).expand_as(used)

    def _replace(self, query_ids, marked):
        """Put the next candidates into the marked slots (B, N); return how many changed.

        Where a pool is exhausted, a slot takes the hardest negative seen instead.
        """
        place = self.next[query_ids, None] + marked.cumsum(1) - 1           # (B, N): in turn
        fresh = marked & (place < self.available[query_ids, None])
        b, n = fresh.nonzero(as_tuple=True)
        self.slots[query_ids[b], n] = place[b, n]
        self.initial[query_ids[b], n] = torch.nan
        for count in (self.next, self.changes):
            count[query_ids] += fresh.sum(1)
        left = (marked & ~fresh).nonzero().tolist()
        return len(b) + sum(self._take_hardest(int(query_ids[b]), n) for b, n in left)

    def _take_hardest(self, query, slot):
        """Put the hardest negative seen into a slot of an exhausted pool; 1 if it changes."""
        self.exhausted[query] = True
        seen = self.last[query].nan_to_num(-torch.inf).clone()
        others = self.slots[query][torch.arange(self.n_negatives) != slot]
        seen[others[others >= 0]] = -torch.inf                              # in use elsewhere
        place = int(seen.argmax())
        if place == int(self.slots[query, slot]):
            return 0                                                        # it is the hardest
        self.slots[query, slot] = place
        self.initial[query, slot] = torch.nan
        self.changes[query] += 1
        return 1

    def stats(self):
        """Return {"replaced", "exhausted", "S", "S_0"} of the last update, for the log line.

        replaced: swaps in this step; exhausted: queries whose pool has run out so far; S and S_0:
        mean current and first cosine of the negatives in this step.
        """
        return dict(self._step)

    def histogram(self):
        """Return {number of changes: queries} over the queries that were visited at all."""
        values, counts = self.changes[self.visits > 0].unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist()))

    STATE = ("candidates", "available", "slots", "next", "initial", "last", "visits", "looked",
             "steps", "changes", "exhausted")

    def state_dict(self):
        """Return all state as tensors; with it a resumed run replaces what this one would have."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state):
        """Take over a state. Raises ValueError if it belongs to another pool."""
        missing = [name for name in self.STATE if name not in state]
        if missing:
            raise ValueError(f"the pool's state lacks {', '.join(missing)}")
        if state["slots"].shape != self.slots.shape:
            raise ValueError(f"the pool's state holds {tuple(state['slots'].shape)} (queries, "
                             f"negatives), this pool {tuple(self.slots.shape)}")
        for name in self.STATE:
            setattr(self, name, state[name].clone())
