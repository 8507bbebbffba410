"""Attention of packed texts on CUDA, with no (T, T) tensor at any alpha (PAPER Sec. 3.2).

All tokens of a batch lie in one list, q (S, H, E) and k, v (S, K, E). The kernels know where each
text starts, so nothing is padded. By Eq. (4) the weight of a future pair (i, j), j > i, depends on
one of the two tokens alone: w_i for axis "row", w_j for "col". So two calls of flash attention make
the soft mask, exactly, for the FLOPs of one bidirectional call:

    the past     keys j <= i: a causal call
    the future   keys j > i: queries without a text's last token, keys without its first
    row          w_i scales the sum over the future: log w_i is added to its log-sum-exp
    col          log w_j rides in two more dims of the key, where the query holds ones

The two are merged by log-sum-exp. Backward calls flash attention's own backward twice. It asks only
for the output and log-sum-exp of the *whole* row, whichever keys it sees, as in ring attention.
`flex` is another way to the same result, and the only one for softmax(logits * M).

S tokens of all texts, B texts, H heads, K key/value heads, E head dim, U tokens with a future.
"""
import functools

import torch
import torch.nn.functional as F

from mask import future_weight

BLOCK = 128                            # tokens: FlexAttention skips whole blocks of this size


class Texts:
    """Where the texts of a packed list lie, and how open each token's future is.

    lengths: B token counts. mask: a `MaskSpec`. `weight`: (S,) float32 in (0, 1], of Eq. (4), for a
    mask that is neither causal nor full; else None. early, late: the tokens that have a future,
    and those that are one.
    """

    def __init__(self, lengths, mask, device):
        self.lengths, self.mask, self.device = torch.tensor(lengths), mask, device
        self.longest = int(self.lengths.max())
        self.starts = self._cumulative(self.lengths)                            # (B + 1,) int32
        self.weight = None
        if not (mask.is_causal or mask.is_full):
            self._weigh()

    def _cumulative(self, lengths):
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(self.device)

    def _weigh(self):
        """Set the weights, and the tokens of the call for the future."""
        position = torch.cat([torch.arange(n) for n in self.lengths.tolist()])  # (S,)
        own = torch.repeat_interleave(self.lengths, self.lengths).float()       # l of each token
        self.weight = future_weight(position, own, self.mask.alpha).to(self.device)
        self.shorter = self._cumulative(self.lengths - 1)                       # (B + 1,) int32
        if len(self.lengths) == 1:         # views of the list, where many texts cost a copy
            self.early, self.late = slice(0, self.longest - 1), slice(1, self.longest)
            return
        has_future, is_future = position < own - 1, position > 0
        self.early, self.late = (x.nonzero()[:, 0].to(self.device)              # (U,)
                                 for x in (has_future, is_future))

    @functools.cached_property
    def blocks(self):
        """Return the `BlockMask` that keeps texts apart: of each block the blocks that it meets."""
        from torch.nn.attention.flex_attention import BlockMask
        ends, total = self.lengths.cumsum(0), int(self.lengths.sum())
        text = torch.repeat_interleave(torch.arange(len(ends)), self.lengths)   # (S,)
        first = torch.arange(0, total, BLOCK)                                   # of each block
        last = (first + BLOCK - 1).clamp(max=total - 1)
        low = (ends - self.lengths)[text[first]] // BLOCK
        count = (ends[text[last]] - 1) // BLOCK - low + 1
        indices = (low[:, None] + torch.arange(len(first))).clamp(max=len(first) - 1)
        text = text.to(self.device)
        return BlockMask.from_kv_blocks(
            count[None, None].int().to(self.device), indices[None, None].int().to(self.device),
            BLOCK_SIZE=BLOCK, seq_lengths=(total, total),
            mask_mod=lambda b, h, i, j: text[i] == text[j])


def attention(q, k, v, texts):
    """Choose the kernel of packed texts; q (S, H, E), k, v (S, K, E) -> like q.

    Causal and bidirectional: flash attention. Soft: two calls of it. Multiplied logits:
    FlexAttention.
    """
    mask, t = texts.mask, texts.longest
    if texts.weight is not None:
        return flex(q, k, v, texts) if mask.apply == "logits" else packed(q, k, v, texts, "soft")
    if t % 128 == 0 and t * len(texts.lengths) == len(q):                   # windows of text
        return equal_lengths(q, k, v, len(texts.lengths), mask.is_causal)
    return packed(q, k, v, texts, "past" if mask.is_causal else "all")


# ---------------------------------------------------------------- the kernel

def _window(see):
    """Return how far a query sees: {keys to its left, to its right}, -1 without a limit."""
    return {"window_size_left": 0 if see == "future" else -1, "window_size_right": -1}


def flash(q, k, v, starts, longest, see, scale):
    """Return (out (S, H, E), log-sum-exp (H, S) float32) of one flash attention call.

    see: "all" keys of the text, those of the "past" (j <= i), or of the "future" (j >= i, as keys
    without the first and queries without the last token are shifted by one). bfloat16 or float16.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, see == "past", False, scale=scale,
        **_window(see))
    return out, lse


def flash_backward(grad, q, k, v, out, lse, starts, longest, see, scale):
    """Return the gradients of q, k, v; out and lse may be those of more keys than it sees."""
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)                # of a dropout of 0
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, starts, starts, longest, longest, 0.0, see == "past", random,
        torch.empty(0, device=q.device), scale=scale, **_window(see))


# ---------------------------------------------------------------- two calls make a soft mask

def _future(q, k, v, texts, scale):
    """Return the (U, .., E) tensors of the call for the future, wider by the weight for "col"."""
    q, k, v, e = q[texts.early], k[texts.late], v[texts.late], q.shape[-1]
    if texts.mask.axis == "row":
        return q, k, v
    extra = texts.weight[texts.late].log().to(torch.promote_types(q.dtype, torch.float32)) / scale
    high = extra.to(q.dtype)                       # what bfloat16 rounds off goes to a second dim
    q, k, v = (F.pad(x, (0, 2 + -(e + 2) % 8)) for x in (q, k, v))              # multiples of 8
    q[..., e:e + 2] = 1
    k[..., e], k[..., e + 1] = high[:, None], (extra - high).to(q.dtype)[:, None]
    return q, k, v


def _parts(q, k):
    """Yield slices (of heads, of key/value heads) that keep the temporaries of a call small."""
    kv, share = k.shape[1], q.shape[1] // k.shape[1]
    step = max(1, kv * 2 ** 24 // q.numel())
    for first in range(0, kv, step):
        last = min(first + step, kv)
        yield slice(first * share, last * share), slice(first, last)


class _Packed(torch.autograd.Function):
    """Attention of packed texts; see: "all", "past", or "soft" by the weights of `texts`."""

    @staticmethod
    def forward(ctx, q, k, v, texts, see, scale):
        ctx.texts, ctx.see, ctx.scale = texts, see, scale
        if see != "soft" or texts.longest == 1:
            ctx.see = "past" if see == "soft" else see      # a lone token has no future
            out, lse = flash(q, k, v, texts.starts, texts.longest, ctx.see, scale)
        else:
            parts = [_Packed.merged(q[:, h], k[:, g], v[:, g], texts, scale)
                     for h, g in _parts(q, k)]
            out, lse = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def merged(q, k, v, texts, scale):
        """Return (out, log-sum-exp) of past and future together."""
        out, lse = flash(q, k, v, texts.starts, texts.longest, "past", scale)
        later, later_lse = flash(*_future(q, k, v, texts, scale), texts.shorter,
                                 texts.longest - 1, "future", scale)
        if texts.mask.axis == "row":
            later_lse = later_lse + texts.weight[texts.early].log()             # (H, U)
        both = torch.logaddexp(lse[:, texts.early], later_lse)
        share = (later_lse - both).exp().T[..., None]                           # (U, H, 1)
        mixed = out[texts.early] * (1 - share) + later[..., :q.shape[-1]] * share
        out[texts.early], lse[:, texts.early] = mixed.to(out.dtype), both
        return out, lse

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        texts, scale, grad = ctx.texts, ctx.scale, grad.contiguous()
        if ctx.see != "soft":
            return *flash_backward(grad, q, k, v, out, lse, texts.starts, texts.longest, ctx.see,
                                   scale), None, None, None
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for h, g in _parts(q, k):
            parts = _Packed.both(grad[:, h], q[:, h], k[:, g], v[:, g], out[:, h], lse[h], texts,
                                 scale)
            for whole, part, heads in zip(grads, parts, (h, g, g)):
                whole[:, heads] = part
        return *grads, None, None, None

    @staticmethod
    def both(grad, q, k, v, out, lse, texts, scale):
        """Return the gradients of q, k, v through past and future."""
        e, early, late = q.shape[-1], texts.early, texts.late
        grads = flash_backward(grad, q, k, v, out, lse.contiguous(), texts.starts, texts.longest,
                               "past", scale)
        wide = _future(q, k, v, texts, scale)
        more = wide[0].shape[-1] - e                       # these dims of the output are zero
        lse = lse[:, early] - (texts.weight[early].log() if texts.mask.axis == "row" else 0)
        later = flash_backward(F.pad(grad[early], (0, more)), *wide, F.pad(out[early], (0, more)),
                               lse.contiguous(), texts.shorter, texts.longest - 1, "future", scale)
        for x, part, tokens in zip(grads, later, (early, late, late)):
            x[tokens] += part[..., :e]
        return grads


def packed(q, k, v, texts, see):
    """Return (S, H, E): attention within each text, to "all" tokens, the "past", or "soft"."""
    e = q.shape[-1]
    if e % 8:                              # flash attention takes multiples of 8
        q, k, v = (F.pad(x, (0, -e % 8)) for x in (q, k, v))
    return _Packed.apply(q, k, v, texts, see, e ** -0.5)[..., :e]


# ---------------------------------------------------------------- other kernels

def equal_lengths(q, k, v, b, is_causal):
    """Return (S, H, E) for b texts of one length by SDPA, whose cuDNN kernel is Hopper's fastest.

    That kernel is built anew for every length: only for lengths that come again and again.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (x.view(b, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, T, E)
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    with sdpa_kernel(list(order), set_priority=True):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1)


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


def flex(q, k, v, texts):
    """Return (S, H, E) of a soft mask by FlexAttention: logits + log w, or logits * w.

    The weights of the tokens are a tensor that the kernel reads, so a moving alpha and other
    lengths compile nothing anew.
    """
    by_row, multiply = texts.mask.axis == "row", texts.mask.apply == "logits"
    weight = texts.weight if multiply else texts.weight.log()                   # (S,)

    def score(logit, b, h, i, j):
        w = weight[i if by_row else j]
        return torch.where(j > i, logit * w if multiply else logit + w, logit)

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                      # (1, H, S, E)
    y = _flex()(q, k, v, score_mod=score, block_mask=texts.blocks, enable_gqa=True)
    return y[0].transpose(0, 1)
