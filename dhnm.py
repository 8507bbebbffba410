"""Dynamic hard negative mining: negatives that have become easy are replaced (PAPER Sec. 3.4).

Every query has a pool of candidates, hardest first, and uses N of them as its hard negatives. The
contrastive loss computes the cosine S of a query and each of its negatives anyway (Eq. 5). S_0 is
the cosine at a negative's first use. The next candidate of the pool takes its place if (Eq. 6)

    |S_0| < 0.4                         it was too easy from the start, or
    1.2 S < S_0  and  |S| < 0.7         it has become easy (or S_0 was negative).

DEVIATES: the paper replaces "in the next training step". That step has other queries, so the
replacement waits for its query's next visit. A single pass over the data visits no query twice, so
DHNM needs several epochs to do anything. Eq. (6) takes the next candidate, the prose samples one:
here it is the next.

UNSPECIFIED: S_0 of a negative that was swapped in. Here it is its first score since then.
UNSPECIFIED: what an exhausted pool does. Here the hardest candidate seen so far comes back with a
new S_0, and the query is counted.
DEVIATES: Eq. (6) prints no absolute values; the prose has them, at 0.4 and at 0.7. So a cosine of
-0.9 counts as hard. But -0.5 is easy at once: 1.2 S < S_0 is true of every negative first score.
"""
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


def should_replace(initial, current):
    """Tell which negatives are too easy, by Eq. (6): a bool tensor of the inputs' shape.

    initial: the cosines S_0 at first use. current: the cosines S now. At first use both are equal.

    >>> should_replace(torch.tensor([0.39, 0.6, 0.9]), torch.tensor([0.39, 0.49, 0.72]))
    tensor([ True,  True, False])
    """
    return (initial.abs() < 0.4) | ((1.2 * current < initial) & (current.abs() < 0.7))


class HardNegativePool:
    """The candidates of Q queries, which of them are in use, and the scores seen so far.

    candidates: for each query a list of ids, hardest first, of any length. Or all as one integer
    tensor (Q, P), where -1 is an empty place at the end.
    policy: "v2", Conan-Embedding-v2's, is Eq. (6); "fixed" keeps the first N, for comparison.

    >>> pool = HardNegativePool([[7, 8, 9]], n_negatives=2)
    >>> pool.negatives([0])
    tensor([[7, 8]])
    >>> pool.update([0], torch.tensor([[0.5, 0.1]]))        # 0.1 < 0.4: 8 was too easy
    >>> pool.negatives([0])
    tensor([[7, 9]])
    """
    STATE = ("candidates", "slots", "next", "initial", "last", "exhausted")

    def __init__(self, candidates, n_negatives=7, policy="v2"):
        if policy not in ("v2", "fixed"):
            raise ValueError(f"policy {policy!r} is unknown; choose v2 or fixed")
        if not torch.is_tensor(candidates):
            lists = [torch.tensor(ids, dtype=torch.int64) for ids in candidates]
            candidates = pad_sequence(lists, batch_first=True, padding_value=-1)
        q, n = len(candidates), n_negatives
        self.policy, self.n_negatives = policy, n
        self.candidates = F.pad(candidates, (0, max(0, n - candidates.shape[1])), value=-1)
        self.depth = self.candidates.shape[1]           # P, of the deepest pool, at least N
        size = (self.candidates >= 0).sum(1, keepdim=True)                  # (Q, 1) of each pool
        # (Q, N): which column of the pool each slot has, -1 for none
        self.slots = torch.where(torch.arange(n) < size, torch.arange(n), -1)
        self.next = size[:, 0].clamp(max=n)                                 # (Q,) first unused one
        self.initial = torch.full((q, n), torch.nan)                        # (Q, N) S_0
        self.last = torch.full(self.candidates.shape, -torch.inf)           # (Q, P) last score
        self.exhausted = torch.zeros(q, dtype=torch.bool)
        self._stats = {"replaced": 0, "used": 0, "exhausted": 0, "S": 0.0, "S_0": 0.0}

    def negatives(self, query_ids):
        """Return the candidate ids in use, (B, N) int64; -1 where a pool is smaller than N."""
        slots = self.slots[torch.as_tensor(query_ids)]                      # (B, N)
        ids = self.candidates[torch.as_tensor(query_ids)].gather(1, slots.clamp(min=0))
        return torch.where(slots < 0, -1, ids.long())

    def update(self, query_ids, scores):
        """Take the cosines (B, N) of the step's hard negatives; replace those that are too easy.

        Scores of empty slots are ignored. Raises ValueError for scores of another shape or not
        finite, or a query that comes twice.
        """
        query_ids, scores = torch.as_tensor(query_ids), scores.detach().float().cpu()
        if scores.shape != (len(query_ids), self.n_negatives):
            raise ValueError(f"scores {tuple(scores.shape)} do not fit {len(query_ids)} queries "
                             f"with {self.n_negatives} negatives")
        if len(query_ids.unique()) != len(query_ids):
            raise ValueError(f"a query comes twice in {query_ids.tolist()}")
        in_use = self.slots[query_ids] >= 0                                 # (B, N)
        if not torch.isfinite(scores[in_use]).all():
            raise ValueError("a negative's score is not a finite number")
        is_first = in_use & self.initial[query_ids].isnan()
        initial = torch.where(is_first, scores, self.initial[query_ids])    # S_0; NaN if empty
        self.initial[query_ids] = initial
        is_visited = (self.last[query_ids] > -torch.inf).any(1, keepdim=True)
        is_swap = is_first & is_visited            # for the log: first step on a swapped-in one
        easy, replaced = should_replace(initial, scores) & in_use, 0
        if self.policy == "fixed":
            easy = torch.zeros_like(easy)
        for row, q in enumerate(query_ids.tolist()):
            self.last[q, self.slots[q, in_use[row]]] = scores[row, in_use[row]]
            for slot in easy[row].nonzero()[:, 0].tolist():
                replaced += self._replace(q, slot)
        count = max(int(in_use.sum()), 1)
        self._stats = {"replaced": replaced, "used": int(is_swap.sum()),
                       "exhausted": int(self.exhausted.sum()),
                       "S": float(scores[in_use].sum()) / count,
                       "S_0": float(initial[in_use].sum()) / count}

    def _replace(self, q, slot):
        """Put a query's next candidate into a slot, or the hardest one seen; tell if it changed."""
        column = int(self.next[q])
        if column < self.candidates.shape[1] and self.candidates[q, column] >= 0:
            self.next[q] += 1
        else:
            self.exhausted[q] = True
            columns, now = self.slots[q], self.slots[q, slot]
            others = columns[(columns >= 0) & (columns != now)]
            column = int(self.last[q].index_fill(0, others, -torch.inf).argmax())
            if self.last[q, column] <= self.last[q, now]:
                return False                                                # none is harder
        self.slots[q, slot], self.initial[q, slot] = column, torch.nan
        return True

    def stats(self):
        """Return {"replaced", "used", "exhausted", "S", "S_0"} of the last update.

        replaced: slots that changed. used: negatives swapped in earlier that this step was the
        first to train on since; 0 in a run that visits no query twice. exhausted: queries whose
        pool has run out so far. S, S_0: mean current and first cosine.
        """
        return dict(self._stats)

    def state_dict(self):
        """Return all state as tensors; a resumed run makes the same replacements with it."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state):
        """Take over a state. Raises ValueError if its shape is another pool's."""
        for name in ("slots", "candidates"):
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"the pool's state has {name} {tuple(state[name].shape)}, this "
                                 f"pool {tuple(getattr(self, name).shape)}")
        for name in self.STATE:
            setattr(self, name, state[name].clone())
