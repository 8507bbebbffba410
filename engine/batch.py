"""What a step hands to the model: flat ids, lengths, and what the losses need; cut into chunks."""
from dataclasses import dataclass

import numpy as np
import torch


def end_text(ids, limit, eos_id):
    """Return the ids of a text to embed: at most `limit`, and the last one is the end of text.

    UNSPECIFIED: the paper does not say how a text ends. With this end no text is empty.

    >>> end_text([5, 6, 7], 3, eos_id=0), end_text([], 3, eos_id=0)
    ([5, 6, 0], [0])
    """
    return ids[:limit - 1] + [eos_id]


@dataclass
class Batch:
    """One step's examples on this rank, as the model takes them.

    ids (S,) and lengths: the texts, in the order queries, positives, negatives (contrastive), or
    sentence1, sentence2 (STS), or the documents of the LM stages, then with targets (S,).
    """
    task: str
    ids: torch.Tensor
    lengths: list
    rows: np.ndarray                       # the examples' numbers in their source
    targets: torch.Tensor | None = None
    skip: list | None = None                       # instruction tokens at the start of each text
    query_ids: torch.Tensor | None = None          # (B,) text ids
    positive_ids: torch.Tensor | None = None       # (B,)
    negative_ids: torch.Tensor | None = None       # (B, N), -1 for an empty place
    known_ids: torch.Tensor | None = None          # (B, P) all positives of each query, -1 padded
    scores: torch.Tensor | None = None             # (B,) STS
    truncated: int = 0                             # texts that were cut

    def to(self, device):
        """Move the tensors; lengths stay on the CPU, where attention is planned."""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        return self

    def chunks(self, n_texts):
        """Yield (ids, lengths, targets or None, skip or None) of up to `n_texts` texts; 0: all."""
        texts, start = len(self.lengths), 0
        n_texts = n_texts or texts
        for first in range(0, texts, n_texts):
            last = min(first + n_texts, texts)
            lengths = self.lengths[first:last]
            end = start + sum(lengths)
            yield (self.ids[start:end], lengths,
                   None if self.targets is None else self.targets[start:end],
                   None if self.skip is None else self.skip[first:last])
            start = end

    @classmethod
    def of(cls, task, texts, limits, tokenizer, rows, **rest):
        """Tokenise `texts`, cut (counted) and end each by `end_text`, and lay them out flat."""
        encoded = tokenizer.encode_batch(texts)
        ended = [end_text(ids, limit, tokenizer.eos_id) for ids, limit in zip(encoded, limits)]
        truncated = sum(len(ids) >= limit for ids, limit in zip(encoded, limits))
        flat = np.fromiter((i for ids in ended for i in ids), dtype=np.int64)
        return cls(task, torch.from_numpy(flat), [len(ids) for ids in ended], rows,
                   truncated=truncated, **rest)
