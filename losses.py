"""The losses: InfoNCE (Eq. 1), CoSENT (Eq. 2), Matryoshka, chunked LM cross-entropy.

Plain functions of embeddings, which is why four vectors are enough to test them. PAPER Sec. 3.1.2.
B batch (pairs), D width, N hard negatives per query, M candidates, V vocabulary, W ranks.

UNSPECIFIED: Eq. (1) prints no temperature (with 1.0 the loss of 64 candidates cannot fall below
2.25), so it is a required argument. DEVIATES: the mean over queries instead of the sum.
Gradient accumulation is *not* a larger contrastive batch: every micro-batch only sees its own
candidates. `cached_backward` is the exact way to a batch beyond memory.
"""
import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---------------------------------------------------------------- InfoNCE, Eq. (1)

class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)                                             # (W * B, D)

    @staticmethod
    def backward(ctx, grad):
        # Each rank's loss used my rows, so my gradient is the sum over the ranks' gradients. DDP's
        # mean over ranks then turns the W local means into the mean over all W * B queries: exact.
        grad = grad.clone(memory_format=torch.contiguous_format)    # others may read this one
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(x):
    """Concatenate (B, D) of every rank to (W * B, D), keeping the gradient; B equal on all ranks.

    Documents are gathered and queries stay local. A gather without gradient points in another
    direction (a third off), gathering both sides scales by 1/W: test_distributed.py holds this one
    against one big batch. The identity when there is one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GatherWithGrad.apply(x)


def _gather_ids(ids):
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ids
    parts = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, ids.contiguous())
    return torch.cat(parts)


def info_nce(query, positive, negatives=None, *, temperature, query_ids=None, positive_ids=None,
             negative_ids=None, return_stats=False):
    """Return (loss, negative_scores): InfoNCE over all positives and hard negatives of the batch.

    Paper: Eq. (1); x_i -> query, y_i+ -> positive, y_j -> every candidate, on every rank.
    query, positive: (B, D), negatives: (B, N, D), any float dtype, of any norm (cosines are taken
    in float32). negative_scores: (B, N) detached cosines, which is what DHNM reads for free
    (Sec. 3.4); (B, 0) without negatives.
    query_ids, positive_ids: (B,), negative_ids: (B, N) int64: equal ids are equal texts. A
    candidate equal to the query's positive, or the positive of an equal query, is a false negative
    and leaves the denominator. A negative id of -1 marks an empty place.
    With `return_stats` a third value: {"accuracy@1", "positive", "hardest_negative"}, means.
    Raises ValueError for a temperature that is not positive or shapes that do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if query.shape != positive.shape or query.dim() != 2:
        raise ValueError(f"query {tuple(query.shape)} and positive {tuple(positive.shape)} must "
                         "both be (B, D)")
    b, d = query.shape
    if negatives is None:
        negatives = query.new_zeros(b, 0, d)
    if negatives.dim() != 3 or negatives.shape[0] != b or negatives.shape[2] != d:
        raise ValueError(f"negatives {tuple(negatives.shape)} must be (B, N, D) for queries "
                         f"{tuple(query.shape)}")
    n = negatives.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q = F.normalize(query.float(), dim=-1)                              # (B, D)
        p = F.normalize(positive.float(), dim=-1)                           # (B, D)
        h = F.normalize(negatives.float(), dim=-1)                          # (B, N, D)
        candidates = torch.cat([gather_with_grad(p),
                                gather_with_grad(h.reshape(b * n, d))])     # (W*B + W*B*N, D)
        scores = q @ candidates.T                                           # (B, M) cosines
        rank = dist.get_rank() if dist.is_initialized() else 0
        label = torch.arange(b, device=q.device) + rank * b                 # my own positive
        excluded = _false_negatives(scores, label, query_ids, positive_ids, negative_ids)
        logits = (scores / temperature).masked_fill(excluded, -torch.inf)
        loss = F.cross_entropy(logits, label)
        negative_scores = torch.einsum("bd,bnd->bn", q, h).detach()         # (B, N)
    if not return_stats:
        return loss, negative_scores
    with torch.no_grad():
        own = scores.gather(1, label[:, None])[:, 0]                        # (B,)
        rest = scores.masked_fill(excluded, -1.0).scatter(1, label[:, None], -1.0)
        hardest = rest.max(dim=1).values                                    # -1 when alone
        stats = {"accuracy@1": (own > hardest).float().mean().item(),
                 "positive": own.mean().item(), "hardest_negative": hardest.mean().item()}
    return loss, negative_scores, stats


def _false_negatives(scores, label, query_ids, positive_ids, negative_ids):
    """Return (B, M) bool: candidates that must not count as negatives of the row's query."""
    excluded = torch.zeros_like(scores, dtype=torch.bool)
    n_pos = len(label) * (dist.get_world_size() if dist.is_initialized() else 1)     # W*B
    if query_ids is not None:
        excluded[:, :n_pos] |= query_ids[:, None] == _gather_ids(query_ids)[None, :]
    if positive_ids is not None:
        excluded[:, :n_pos] |= positive_ids[:, None] == _gather_ids(positive_ids)[None, :]
    if negative_ids is not None:
        other = _gather_ids(negative_ids.reshape(-1))                       # (W*B*N,)
        excluded[:, n_pos:] |= (other == -1)[None, :]
        if positive_ids is not None:
            excluded[:, n_pos:] |= positive_ids[:, None] == other[None, :]
    return excluded.scatter(1, label[:, None], False)       # the positive itself always counts


# ---------------------------------------------------------------- CoSENT, Eq. (2)

def cosent_loss(cosine, score, *, temperature):
    """Return log(1 + sum over score_i > score_j of exp((cos_j - cos_i) / temperature)), a scalar.

    Paper: Eq. (2); tau -> temperature. cosine, score: (B,); only the order of the scores counts.
    Pairs across ranks count as well, and every rank returns the loss of all of them.
    Pairs with equal scores say nothing and are left out; all-equal scores give 0 with a zero
    gradient. O(B log B): sorted by score, the pairs of row i are a prefix, whose logsumexp is a
    cumulative one. Raises ValueError for shapes that differ or scores that are not finite.

    >>> cosent_loss(torch.tensor([0.9, 0.1]), torch.tensor([1., 0.]), temperature=1.0)
    tensor(0.3711)
    """
    if cosine.shape != score.shape or cosine.dim() != 1:
        raise ValueError(f"cosine {tuple(cosine.shape)} and score {tuple(score.shape)} must both "
                         "be (B,)")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not torch.isfinite(score).all():
        raise ValueError("a score is not a finite number")
    cosine, score = gather_with_grad(cosine.float()), _gather_ids(score)    # (W*B,), exact as above
    # For rows in ascending score: sum over (i, j) = sum over i of e^{-cos_i} sum_{j < i} e^{cos_j}
    score, order = score.sort()
    x = cosine[order] / temperature                                         # (W*B,)
    prefix = torch.logcumsumexp(x, dim=0)                                   # (W*B,)
    below = torch.searchsorted(score, score, right=False)   # how many scores are strictly lower
    has_pairs = below > 0
    terms = prefix[below[has_pairs] - 1] - x[has_pairs]                     # (rows with pairs,)
    return torch.logsumexp(torch.cat([x.new_zeros(1) + 0.0 * x.sum(), terms]), dim=0)


# ---------------------------------------------------------------- Matryoshka

def matryoshka(loss_fn, embeddings, dims, weights=None):
    """Return the weighted mean of `loss_fn` over prefixes of the embeddings.

    PAPER Sec. 3.1.2, App. A. UNSPECIFIED: the weights; equal here. Every prefix is renormalised.
    embeddings: a tuple of (..., D) tensors, None allowed; dims: increasing, at most D.
    `loss_fn(*prefixes)` returns a scalar, or a tuple whose first item is the scalar: the rest is
    then taken from the largest dim (DHNM reads the full embedding) and handed through.
    Raises ValueError for a dim outside 1 .. D or weights that do not match the dims.
    """
    width = min(e.shape[-1] for e in embeddings if e is not None)
    if not dims or min(dims) < 1 or max(dims) > width:
        raise ValueError(f"dims {tuple(dims)} must lie between 1 and the width {width}")
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims):
        raise ValueError(f"{len(weights)} weights for {len(dims)} dims")
    total, rest = 0.0, None
    for dim, weight in sorted(zip(dims, weights)):
        out = loss_fn(*(None if e is None else F.normalize(e[..., :dim].float(), dim=-1)
                        for e in embeddings))
        loss, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        total = total + weight * loss
    total = total / sum(weights)
    return total if rest is None else (total, *rest)


# ---------------------------------------------------------------- cached two-pass step

def cached_backward(encode, chunks, loss_fn, no_sync=contextlib.nullcontext, scale=1.0):
    """Backpropagate a contrastive loss over a batch too large for one pass; exact.

    Pass 1 embeds every chunk without a graph; the loss gives d loss / d embedding; pass 2 embeds
    each chunk again and backpropagates that gradient through it. One extra forward (4/3 of the
    time), memory of one chunk. encode: chunk -> (b, D); loss_fn: (sum of b, D) -> (loss, *rest).
    `no_sync` opens a context in which backward does not synchronise gradients: it wraps all chunks
    but the last, so that there is one synchronisation a step. Exact only without dropout, which
    this project does not have. A single chunk needs no second pass and gets none. Returns what
    loss_fn returns, the loss detached.
    """
    if len(chunks) == 1:
        out = loss_fn(encode(chunks[0]).float())
        loss, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        (loss * scale).backward()
        return (loss.detach(), *rest)
    with torch.no_grad():
        embedded = [encode(chunk) for chunk in chunks]
    whole = torch.cat(embedded).float().requires_grad_()
    out = loss_fn(whole)
    loss, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
    grads = torch.autograd.grad(loss * scale, whole)[0].split([len(e) for e in embedded])
    for i, (chunk, grad) in enumerate(zip(chunks, grads)):
        with no_sync() if i < len(chunks) - 1 else contextlib.nullcontext():
            (encode(chunk).float() * grad).sum().backward()
    return (loss.detach(), *rest)


# ---------------------------------------------------------------- LM cross-entropy in chunks

class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        count = (targets != -100).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_h = torch.empty_like(hidden)
        grad_w = torch.zeros_like(weight, dtype=torch.float32)
        cast = weight.to(hidden.dtype)
        for part, h, t in zip(grad_h.split(chunk), hidden.split(chunk), targets.split(chunk)):
            log_p = torch.log_softmax(h @ cast.T, dim=1, dtype=torch.float32)   # (chunk, V)
            keep = t != -100
            at = torch.where(keep, t, 0)[:, None]           # any other negative id is an error
            total -= (log_p.gather(1, at)[:, 0] * keep).sum()
            # d loss / d logits = (softmax - one-hot) / count; formed in place of log_p
            g = log_p.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=torch.float32))
            g = g.mul_((keep / count)[:, None]).to(hidden.dtype)                # (chunk, V)
            part.copy_(g @ cast)
            if h.dtype == grad_w.dtype:
                grad_w.addmm_(g.T, h)                       # without a second (V, D)
            else:
                grad_w += g.T @ h
        ctx.save_for_backward(grad_h, grad_w.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, grad_w * grad, None, None


def logits_chunk(vocab_size, kind):
    """Return the tokens whose logits are held at a time: 64 MB of float32 on a CPU, 2 GB on a card.

    Fewer would starve the matmuls, and for a small vocabulary more would not make them faster.
    """
    least, most, numbers = (128, 1024, 2 ** 24) if kind == "cpu" else (1024, 16_384, 2 ** 29)
    return min(max(numbers // vocab_size, least), most)


def lm_cross_entropy(hidden, weight, targets, chunk=None):
    """Return the mean next-token loss, a float32 scalar, without ever holding all logits.

    hidden: (S, D), weight: (V, D) the (tied) output embedding, targets: (S,) int64 with -100 where
    nothing is predicted. The gradient is formed chunk by chunk in the forward pass, so peak memory
    is chunk * V instead of S * V (at V = 150,000 and S = 32,768: 20 GB in float32). The matmuls run
    in hidden's dtype, softmax and the sums in float32. No target at all gives 0. `chunk` in tokens;
    None: see `logits_chunk`.
    """
    chunk = chunk or logits_chunk(len(weight), hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
