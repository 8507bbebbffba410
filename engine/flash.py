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

S tokens of all texts, B texts, H heads, K key/value heads, E head dim, U tokens with a future.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mask import future_weight


@dataclass(frozen=True)
class Span:
    """What a call of flash attention sees, beside its tensors.

    starts: (B + 1,) int32, of each text and the end. see: "all" keys of the text, those of the
    "past" (j <= i), or of the "future" (j >= i: keys lack the first, queries the last token, so
    they are shifted by one). scale: of the logits.
    """
    starts: torch.Tensor
    longest: int
    see: str
    scale: float

    @property
    def window(self):
        """Return how far a query sees to either side, -1 without a limit."""
        return {"window_size_left": 0 if self.see == "future" else -1, "window_size_right": -1}


class Texts:
    """Where the texts of a packed list lie, and how open each token's future is.

    lengths: B token counts. mask: a `MaskSpec`. `weight`: (S,) float32 in (0, 1], of Eq. (4); None
    for a mask that is causal or full, or if no token has a future. early, late: the tokens that
    have a future, and those that are one.
    """

    def __init__(self, lengths, mask, device):
        self.lengths, self.mask, self.device = torch.tensor(lengths), mask, device
        self.longest = int(self.lengths.max())
        self.starts = self._cumulative(self.lengths)                            # (B + 1,) int32
        self.weight = None
        if not (mask.is_causal or mask.is_full or self.longest == 1):
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


def attention(q, k, v, texts):
    """Choose the kernel of packed texts; q (S, H, E), k, v (S, K, E) -> like q."""
    t, b = texts.longest, len(texts.lengths)
    if texts.weight is None and t % 128 == 0 and t * b == len(q):      # windows of text
        return equal_lengths(q, k, v, b, texts.mask.is_causal)
    return packed(q, k, v, texts)


# ---------------------------------------------------------------- the kernel

def flash(qkv, span):
    """Return (out (S, H, E), log-sum-exp (H, S) float32) of one call; 16 bits on CUDA."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *qkv, span.starts, span.starts, span.longest, span.longest, 0.0, span.see == "past", False,
        scale=span.scale, **span.window)
    return out, lse


def flash_backward(grad, qkv, out, lse, span):
    """Return the gradients of q, k, v; out and lse may be those of more keys than it sees."""
    random = torch.zeros(2, dtype=torch.uint64, device=grad.device)             # of a dropout of 0
    return torch.ops.aten._flash_attention_backward(
        grad, *qkv, out, lse.contiguous(), span.starts, span.starts, span.longest, span.longest,
        0.0, span.see == "past", random, torch.empty(0, device=grad.device), scale=span.scale,
        **span.window)


# ---------------------------------------------------------------- two calls make a soft mask

def _future(qkv, texts, scale):
    """Return the (U, .., E) tensors of the call for the future, wider by the weight for "col"."""
    q, k, v = (x[tokens] for x, tokens in zip(qkv, (texts.early, texts.late, texts.late)))
    if texts.mask.axis == "row":
        return q, k, v
    e = q.shape[-1]
    extra = texts.weight[texts.late].log().to(torch.promote_types(q.dtype, torch.float32)) / scale
    high = extra.to(q.dtype)                       # what bfloat16 rounds off goes to a second dim
    q, k, v = (F.pad(x, (0, 2 + -(e + 2) % 8)) for x in (q, k, v))              # multiples of 8
    q[..., e:e + 2] = 1
    k[..., e], k[..., e + 1] = high[:, None], (extra - high).to(q.dtype)[:, None]
    return q, k, v


def _spans(texts, scale):
    """Return the spans of the two calls: the past and the future."""
    return (Span(texts.starts, texts.longest, "past", scale),
            Span(texts.shorter, texts.longest - 1, "future", scale))


def _parts(q, k):
    """Yield slices (of heads, of key/value heads) that keep the temporaries of a call small."""
    kv, share = k.shape[1], q.shape[1] // k.shape[1]
    step = max(1, kv * 2 ** 24 // q.numel())
    for first in range(0, kv, step):
        last = min(first + step, kv)
        yield slice(first * share, last * share), slice(first, last)


def soft(qkv, texts, scale):
    """Return (out, log-sum-exp) of past and future together."""
    past, future = _spans(texts, scale)
    out, lse = flash(qkv, past)
    later, later_lse = flash(_future(qkv, texts, scale), future)
    if texts.mask.axis == "row":
        later_lse = later_lse + texts.weight[texts.early].log()                 # (H, U)
    both = torch.logaddexp(lse[:, texts.early], later_lse)
    share = (later_lse - both).exp().T[..., None]                               # (U, H, 1)
    mixed = out[texts.early] * (1 - share) + later[..., :out.shape[-1]] * share
    out[texts.early], lse[:, texts.early] = mixed.to(out.dtype), both
    return out, lse


def soft_backward(grad, qkv, out, lse, texts, scale):
    """Return the gradients of q, k, v through past and future."""
    past, future = _spans(texts, scale)
    early, late, e = texts.early, texts.late, out.shape[-1]
    grads = flash_backward(grad, qkv, out, lse, past)
    wide = _future(qkv, texts, scale)
    more = wide[0].shape[-1] - e                           # these dims of the output are zero
    lse = lse[:, early] - (texts.weight[early].log() if texts.mask.axis == "row" else 0)
    later = flash_backward(F.pad(grad[early], (0, more)), wide, F.pad(out[early], (0, more)), lse,
                           future)
    for x, part, tokens in zip(grads, later, (early, late, late)):
        x[tokens] += part[..., :e]
    return grads


class _Packed(torch.autograd.Function):
    """Attention of packed texts; span: of one call, or None for the two of a soft mask."""

    @staticmethod
    def forward(ctx, q, k, v, texts, span, scale):
        ctx.texts, ctx.span, ctx.scale = texts, span, scale
        if span:
            out, lse = flash((q, k, v), span)
        else:
            parts = [soft((q[:, h], k[:, g], v[:, g]), texts, scale) for h, g in _parts(q, k)]
            out, lse = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        *qkv, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.span:
            return *flash_backward(grad, qkv, out, lse, ctx.span), None, None, None
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]
        for h, g in _parts(*qkv[:2]):
            parts = soft_backward(grad[:, h], [x[:, heads] for x, heads in zip(qkv, (h, g, g))],
                                  out[:, h], lse[h], ctx.texts, ctx.scale)
            for whole, part, heads in zip(grads, parts, (h, g, g)):
                whole[:, heads] = part
        return *grads, None, None, None


def packed(q, k, v, texts):
    """Return (S, H, E): flash attention within each text, under the mask of `texts`."""
    e, span = q.shape[-1], None
    most = 248 if texts.weight is not None and texts.mask.axis == "col" else 256
    if e > most:                           # "col" adds up to 9 to it
        raise ValueError(f"n_embd / n_head is {e}; flash attention takes {most} at most")
    if texts.weight is None:
        span = Span(texts.starts, texts.longest, "past" if texts.mask.is_causal else "all",
                    e ** -0.5)
    if e % 8:                              # flash attention takes multiples of 8
        q, k, v = (F.pad(x, (0, -e % 8)) for x in (q, k, v))
    out = _Packed.apply(q, k, v, texts, span, e ** -0.5)
    return out[..., :e] if e % 8 else out  # torch.compile knows a view from a whole tensor


def backends(device):
    """Return SDPA's kernels on a device, best first: on Hopper cuDNN's, which is the fastest there.

    On Blackwell that one is wrong for fewer than 8 key/value heads (pytorch issue 193893).
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *kernels] if is_hopper else kernels


def equal_lengths(q, k, v, b, is_causal):
    """Return (S, H, E) for b texts of one length by SDPA.

    cuDNN's kernel is built anew for every length: only for lengths that come again and again.
    """
    q, k, v = (x.view(b, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, T, E)
    with sdpa_kernel(backends(q.device), set_priority=True):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1)
