"""The losses of the embedding stages: InfoNCE (Eq. 1), CoSENT (Eq. 2), Matryoshka (App. A).

Plain functions of embeddings (PAPER Sec. 3.1.2). Four vectors are enough to check each by hand.

UNSPECIFIED: Eq. (1) prints no temperature. With 1.0 the loss of 64 candidates cannot fall below
2.25. So the temperature is a required argument. DEVIATES: the mean over queries, not the sum.
UNSPECIFIED: the candidates M of Eq. (1). Here all positives and hard negatives of all ranks, its
own positive among them. Others that answer the query leave its sum.

Shapes: B queries of this rank (one of torchrun's processes), D width, N hard negatives of a query,
W ranks, M candidates of all ranks (W * B positives, then W * B * N hard negatives), P known
positives of a query.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---------------------------------------------------------------- across ranks

class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)                                             # (W * B, ...)

    @staticmethod
    def backward(ctx, grad):
        # Each rank's loss used my rows, so my gradient is the sum over the ranks' gradients. DDP's
        # mean over ranks then turns the W local means into the mean over all W * B queries: exact.
        grad = grad.clone(memory_format=torch.contiguous_format)    # others may read this one
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(x):
    """Concatenate (B, ...) of every rank to (W * B, ...), keeping the gradient; x itself if W = 1
    or it is empty.

    B must be equal on all ranks. InfoNCE gathers documents, and each rank scores its own queries.
    CoSENT gathers both sides. A gather without gradient would lose what other ranks' queries say
    of these documents. CoSENT's loss is the same on all ranks, which gives W times the gradient;
    the mean over ranks takes that back.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return x if alone or not x.numel() else _Gather.apply(x)


# ---------------------------------------------------------------- InfoNCE, Eq. (1)

def info_nce(query, positive, negatives=None, excluded=None, *, temperature):
    """Return (loss, negative_scores): InfoNCE over all positives and hard negatives of the batch.

    PAPER Eq. 1: x_i -> query, y_i+ -> positive, y_j -> every candidate, on every rank.
    query, positive: (B, D), negatives: (B, N, D) or None, of any norm and float dtype.
    excluded: (B, M) bool or None, candidates that leave a query's sum (see false_negatives).
    negative_scores: (B, N) detached cosines of each query with its own hard negatives, for DHNM.
    Raises ValueError for a temperature that is not positive, or embeddings that do not fit.
    """
    b, d = query.shape
    negatives = query.new_zeros(b, 0, d) if negatives is None else negatives
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if positive.shape != (b, d) or negatives.shape != (b, negatives.shape[1], d):
        raise ValueError(f"positive {tuple(positive.shape)} and negatives {tuple(negatives.shape)} "
                         f"must be (B, D) and (B, N, D) for queries {(b, d)}")
    with torch.autocast(query.device.type, enabled=False):
        q, p, h = (F.normalize(x.float(), dim=-1) for x in (query, positive, negatives))
        candidates = torch.cat([gather_with_grad(p), gather_with_grad(h.flatten(0, 1))])    # (M, D)
        logits = q @ candidates.T / temperature                             # (B, M)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        loss = F.cross_entropy(logits, own_positives(b, q.device))
        return loss, torch.einsum("bd,bnd->bn", q, h).detach()              # PAPER Eq. 5: S


def own_positives(b, device):
    """Return (B,): which of the M candidates is each query's own positive."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank * b + torch.arange(b, device=device)


def false_negatives(query_ids, positive_ids, negative_ids=None, known_ids=None):
    """Return (B, M) bool, True where a candidate is no negative of the row's query.

    query_ids, positive_ids: (B,), negative_ids: (B, N), known_ids: (B, P), int64; equal ids are
    equal texts. Empty places (-1) are excluded, and so is every right answer. That is a text in the
    query's known_ids, or the positive of a query with the same id. Its own positive stays.
    """
    queries, positives = gather_with_grad(query_ids), gather_with_grad(positive_ids)    # (W * B,)
    hard = positive_ids[:0] if negative_ids is None else negative_ids.flatten()
    candidates = torch.cat([positives, gather_with_grad(hard)])             # (M,)
    is_equal = queries == query_ids[:, None]                                # (B, W * B)
    is_answer = candidates == positives[:, None]                            # (W * B, M)
    # a query that equals the row's has this candidate as its positive
    excluded = (is_equal.float() @ is_answer.float() > 0) | (candidates == -1)             # (B, M)
    if known_ids is not None:
        for known in known_ids.T:                                           # (B,)
            excluded |= candidates == known[:, None]
    own = own_positives(len(query_ids), excluded.device)
    return excluded.scatter(1, own[:, None], False)


# ---------------------------------------------------------------- CoSENT, Eq. (2)

def cosent_loss(cosine, score, *, temperature):
    """Return log(1 + sum over score_i > score_j of exp((cos_j - cos_i) / temperature)), a scalar.

    PAPER Eq. 2: tau -> temperature. cosine, score: (B,), one entry for each sentence pair. Only the
    order of the scores counts; equal scores say nothing. UNSPECIFIED: which pairs are compared.
    Here those of all ranks, and every rank returns the loss of all. Memory is quadratic: several
    (W * B, W * B) matrices in float32. Raises ValueError for shapes that differ or a temperature
    that is not positive.

    >>> cosent_loss(torch.tensor([0.9, 0.1]), torch.tensor([1., 0.]), temperature=1.0)
    tensor(0.3711)
    """
    if cosine.shape != score.shape or cosine.dim() != 1:
        raise ValueError(f"cosine {tuple(cosine.shape)} and score {tuple(score.shape)} must both "
                         "be (B,)")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    cosine, score = gather_with_grad(cosine.float()), gather_with_grad(score)           # (W * B,)
    difference = (cosine[None, :] - cosine[:, None]) / temperature          # cos_j - cos_i
    is_pair = score[:, None] > score[None, :]                               # sim(i) > sim(j)
    terms = difference.masked_fill(~is_pair, -torch.inf).flatten()
    return torch.logsumexp(F.pad(terms, (1, 0)), dim=0)                     # the pad: 1 = e^0


# ---------------------------------------------------------------- Matryoshka

def matryoshka(loss_fn, embeddings, dims):
    """Return (loss, rest): the mean loss over prefixes of the embeddings, each renormalised.

    PAPER Sec. 4.6.1, App. A. UNSPECIFIED: the weights; equal here. embeddings: tensors (..., D).
    loss_fn(*prefixes) returns (loss, rest); the rest of the largest dim is handed through, which is
    the full width in training: DHNM reads it. Raises ValueError for a dim outside 1 .. D.
    """
    width = min(x.shape[-1] for x in embeddings)
    if not dims or min(dims) < 1 or max(dims) > width:
        raise ValueError(f"dims {tuple(dims)} must lie between 1 and the width {width}")
    total, rest = 0.0, None
    for dim in sorted(dims):
        loss, rest = loss_fn(*(F.normalize(x[..., :dim].float(), dim=-1) for x in embeddings))
        total = total + loss / len(dims)
    return total, rest
