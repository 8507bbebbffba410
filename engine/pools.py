"""Pools of hard negatives, shared out: each rank holds the state of its own rows, every W-th one.

At each visit another rank may draw a row. So the ids, negatives and cosines of a step go round: a
few KB. The answers are those of one `HardNegativePool` (dhnm.py), whatever the number of ranks.
"""
import numpy as np
import torch

from dhnm import HardNegativePool
from engine.distributed import together


def pool_of(candidates, world, n_negatives, policy):
    """Return the pool of all candidates (Q, P), a tensor or a mapped array; all ranks must call."""
    own = candidates[world.rank::world.size]
    own = own.clone() if torch.is_tensor(own) else torch.from_numpy(np.array(own))
    width = max(world.gather_objects(int((own >= 0).sum(1).max()) if len(own) else 0))
    pool = HardNegativePool(own[:, :width], n_negatives, policy)
    return SharedPool(pool, world) if world.size > 1 else pool


class SharedPool:
    """A `HardNegativePool` over W ranks; all of them call each method. Row q is rank q % W's.

    own: the pool of this rank's rows, in order.
    """

    def __init__(self, own, world):
        self.own, self.world, self._stats = own, world, own.stats()
        self.depth = own.depth                         # the same on all ranks

    def _owned(self, query_ids):
        """Return (which of the rows are this rank's, their numbers in its own pool)."""
        is_own = query_ids % self.world.size == self.world.rank
        return is_own, query_ids[is_own] // self.world.size

    def negatives(self, query_ids):
        """Return the candidate ids in use of this rank's share of a batch, (B, N) int64."""
        parts = self.world.gather_objects(torch.as_tensor(query_ids))
        every, first = torch.cat(parts), sum(map(len, parts[:self.world.rank]))
        is_own, rows = self._owned(every)
        ids = torch.zeros(len(every), self.own.n_negatives, dtype=torch.int64)
        ids[is_own] = self.own.negatives(rows) + 1                          # 0: another rank's
        ids = sum(self.world.gather_objects(ids)) - 1
        return ids[first:first + len(query_ids)]

    def update(self, query_ids, scores):
        """Take the cosines (B, N) of this rank's share of a batch."""
        parts = self.world.gather_objects((torch.as_tensor(query_ids), scores.detach().cpu()))
        query_ids, scores = map(torch.cat, zip(*parts))
        is_own, rows = self._owned(query_ids)
        count = int((self.own.negatives(rows) >= 0).sum())

        def work():
            self.own.update(rows, scores[is_own])
            return self.own.stats(), count
        parts = together(self.world, work)
        total = max(sum(count for _, count in parts), 1)
        self._stats = {name: sum(stats[name] for stats, _ in parts)
                       for name in ("replaced", "used", "exhausted")}
        self._stats |= {name: sum(stats[name] * count for stats, count in parts) / total
                        for name in ("S", "S_0")}

    def stats(self):
        """Return what `HardNegativePool.stats` returns, of all rows."""
        return dict(self._stats)

    def state_dict(self):
        """Return the state of all rows on the main rank, {} on others."""
        state = {}
        for name, value in self.own.state_dict().items():      # one at a time
            parts = self.world.gather_to_main(value)
            if parts:
                state[name] = value.new_empty(sum(map(len, parts)), *value.shape[1:])
                for rank, part in enumerate(parts):
                    state[name][rank::self.world.size] = part
        return state

    def load_state_dict(self, state):
        """Take over this rank's rows of a state of all rows."""
        self.own.load_state_dict({name: value[self.world.rank::self.world.size]
                                  for name, value in state.items()})
