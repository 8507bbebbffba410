"""The six operations of model.py, faster: `Conan(config, ops=pick(device))`.

    prepare           lays texts of like lengths out as padded blocks, and forms log M once a batch
    attention         CUDA in 16 bits: flash.py. Else block by block, by SDPA or by plain matmuls
    rms_norm, rope,   gradients written by hand: autograd keeps more and copies more than they need
    swiglu
    next_token_loss   logits and their gradient in chunks, never all at once

tests/engine/test_kernels.py compares them with the plain ones, forward and backward.

Shapes: B texts of a group, T tokens of its longest, P = sum of B * T slots, a slot being one place
of a padded block; otherwise as in model.py.
"""
import math
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from engine import flash
from mask import mask_weights

SMALL = 1 << 15                    # numbers in a group's queries, up to which SDPA is faster
LONG_ROW = 128                     # numbers in a row, from which softmax in 16 bits is faster
FEW = 32                           # tokens, below which MKL beats oneDNN in float32, but for AMD


def pick(device, compile=False):
    """Return the operations that are faster than the plain ones on `device`, for `Conan`'s `ops`.

    compile: torch.compile fuses the plain rms_norm, rope and swiglu itself. Shapes inside attention
    change with every batch: it stays eager.
    """
    ops = {"prepare": prepare, "attention": attention, "next_token_loss": next_token_loss}
    if compile:
        ops["attention"] = torch.compiler.disable(attention)
    else:
        on_cuda = torch.device(device).type == "cuda"      # an NPU has no kernel of torch's norm
        ops |= {"rms_norm": fused_rms_norm if on_cuda else rms_norm, "rope": rope, "swiglu": swiglu}
    return SimpleNamespace(**ops)


def matmul_dtype(x):
    """Return the dtype of matmuls: that of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ---------------------------------------------------------------- texts of unequal lengths

@dataclass
class Group:
    """Texts of like lengths that attention treats as one padded block of shape (B, T)."""
    shape: tuple
    bias: torch.Tensor | None      # added to the logits, (B or 1, 1, 1 or T, T)
    weights: torch.Tensor | None   # multiplied with the logits, (B or 1, 1, T, T)


class Layout:
    """Where each token of the flat list lies among the padded slots of all groups.

    token_of_slot: (P,) the token that a slot holds; a pad repeats one. slot_of_token: (S,).
    is_token: (P,) bool. is_dense: the slots are the flat list itself, nothing needs to move; a text
    by itself has none of the three above.
    """
    MIN_FILL = 0.85                # shortest / longest text of a group, apart from eight tokens

    def __init__(self, lengths, mask, device, dtype):
        lengths, self.is_dense = torch.tensor(lengths), len(lengths) == 1
        if self.is_dense:                              # a single query has little time to lose
            is_token = torch.ones(1, int(lengths), dtype=torch.bool)
            formed = form_mask(mask, lengths, is_token, device, dtype)
            self.mask, self.groups = mask, [Group(tuple(is_token.shape), *formed)]
            return
        starts = lengths.cumsum(0) - lengths                                # (B,)
        order = torch.argsort(lengths, descending=True, stable=True)
        self.mask, self.groups, tokens, real = mask, [], [], []
        for members in self._split(order, lengths[order].tolist()):
            own = lengths[members]                                          # of this group
            place = torch.arange(int(own[0]))
            is_token = place < own[:, None]                                 # (B, T)
            tokens.append(torch.where(is_token, starts[members, None] + place, 0).flatten())
            real.append(is_token.flatten())
            bias, weights = form_mask(mask, own, is_token, device, dtype)
            self.groups.append(Group(tuple(is_token.shape), bias, weights))
        tokens, real = torch.cat(tokens), torch.cat(real)                   # (P,)
        slots = torch.empty(int(lengths.sum()), dtype=torch.int64)          # (S,)
        slots[tokens[real]] = real.nonzero()[:, 0]
        self.is_dense = torch.equal(tokens, torch.arange(len(slots)))
        self.token_of_slot, self.slot_of_token = tokens.to(device), slots.to(device)
        self.is_token = real.to(device)

    def _split(self, order, sizes):
        """Yield the texts of each group; sizes are the lengths in falling order."""
        first = 0
        for i in range(1, len(sizes) + 1):
            if i == len(sizes) or sizes[i] < self.MIN_FILL * sizes[first] - 8:
                yield order[first:i]
                first = i


def form_mask(mask, lengths, is_token, device, dtype):
    """Return (bias, weights) of a group; both None if it is causal, or full without pads.

    Pads come last, so no token of a causal group sees one. PAPER Eq. 4: l is each text's own
    length; texts of one length share their M.
    """
    bias, has_pads = None, not bool(is_token.all())
    if has_pads and not mask.is_causal:
        bias = torch.zeros(is_token.shape, dtype=dtype).masked_fill(~is_token, -torch.inf)
        bias = bias[:, None, None].to(device)
    if mask.is_causal or mask.is_full:
        return bias, None
    place = torch.arange(is_token.shape[1], device=device)
    own = (lengths if has_pads else lengths[:1]).to(device)
    m = mask_weights(place[:, None], place, own[:, None, None].float(), mask.alpha, mask.axis)
    if mask.apply == "logits":
        return bias, m[:, None]
    m = m[:, None].log().to(dtype)
    return m if bias is None else m + bias, None


class _Move(torch.autograd.Function):
    """Return x[there], (P, ...) slots of (S, ...) tokens or the other way; `back` is the way back.

    The gradient is a look-up, not a scatter: what a pad holds never reaches a loss. Where `is_pad`
    (P,) is given, it is zero.
    """

    @staticmethod
    def forward(ctx, x, there, back, is_pad=None):
        ctx.back, ctx.is_pad = back, is_pad
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.back)
        if ctx.is_pad is not None:
            grad.masked_fill_(ctx.is_pad, 0)
        return grad, None, None, None


# ---------------------------------------------------------------- attention

def prepare(lengths, mask, x):
    """Return where the texts lie: `flash.Texts` for 16 bits on CUDA, else a `Layout`."""
    dtype = matmul_dtype(x)
    if takes_packed_texts(x.device, dtype, mask):
        return flash.Texts(lengths, mask, x.device)
    return Layout(lengths, mask, x.device, dtype)


def takes_packed_texts(device, dtype, mask):
    """Tell whether flash attention can do it: 16 bits, Ampere or newer, and no logits * M.

    Torch for Windows is built without it.
    """
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and (mask.is_full or mask.apply == "weights")
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.is_bf16_supported(including_emulation=False))


def attention(q, k, v, texts):
    """Return (S, H, E) as `model.attention` does; q: (S, H, E), k, v: (S, K, E)."""
    if isinstance(texts, flash.Texts):
        return flash.attention(q, k, v, texts)
    if not texts.is_dense:
        q, k, v = (_Move.apply(x, texts.token_of_slot, texts.slot_of_token)
                   for x in (q, k, v))                                      # (P, H or K, E)
    if len(texts.groups) == 1:                     # nothing to split, nor to put together
        y = group_attention(q, k, v, texts.groups[0], texts.mask)
    else:
        sizes = [b * t for b, t in (group.shape for group in texts.groups)]
        parts = zip(*(x.split(sizes) for x in (q, k, v)), texts.groups)
        y = torch.cat([group_attention(*part, texts.mask) for part in parts])
    if texts.is_dense:
        return y
    return _Move.apply(y, texts.slot_of_token, texts.token_of_slot, ~texts.is_token[:, None, None])


def group_attention(q, k, v, group, mask):
    """Return the attention of one group's slots: q (B T, H, E), k, v (B T, K, E) -> like q."""
    q, k, v = (x.view(*group.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    # measured on a CPU in bfloat16: up to 256 tokens plain matmuls beat SDPA 2 to 4 times, but not
    # for a few short texts, nor where SDPA can use AMX and needs no gradient
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256 \
        and q.numel() > SMALL and (torch.is_grad_enabled() or not has_amx())
    if group.weights is not None or plain:
        y = explicit_attention(q, k, v, group.bias, mask.is_causal, group.weights)
    else:
        if q.is_cuda and q.dtype == torch.float32:     # SDPA's kernels take no groups in float32
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=group.bias, enable_gqa=k.shape[1] < q.shape[1],
            is_causal=mask.is_causal and q.shape[2] > 1)
    return y.transpose(1, 2).flatten(0, 1)                                  # (B T, H, E)


@cache
def is_amd():
    """Tell whether this CPU is AMD's, where MKL leaves half of AVX-512 unused."""
    return torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")


@cache
def has_amx():
    """Tell whether this CPU multiplies tiles of bfloat16 (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def explicit_attention(q, k, v, bias=None, is_causal=False, weights=None):
    """Return softmax(q k^T / sqrt(E) [* weights] + bias) v in plain matmuls.

    q: (B, H, T, E), k, v: (B, K, T, E); bias, weights: broadcastable to (B, 1, T, T). The query
    heads that share a key/value head are one matmul, where `model.attention` repeats the keys.
    """
    b, h, t, e = q.shape
    kv = k.shape[1]
    q = (q * (1.0 / math.sqrt(e))).reshape(b, kv, h // kv * t, e)
    logits = (q @ k.transpose(-2, -1)).view(b, kv, h // kv, t, t)           # (B, K, H/K, T, T)
    if weights is not None:
        logits = logits * weights[:, :, None]
    if is_causal:                                  # added, not filled in: it has no gradient
        bias = torch.full((1, 1, t, t), -torch.inf, dtype=logits.dtype, device=q.device).triu(1)
    if bias is not None:
        logits = logits + bias[:, :, None]
    # softmax forms its sums in float32 in any case
    wide = torch.float32 if t < LONG_ROW else None
    probs = torch.softmax(logits, dim=-1, dtype=wide).to(v.dtype)
    return (probs.reshape(b, kv, h // kv * t, t) @ v).view(b, h, t, e)


# ---------------------------------------------------------------- gradients written by hand

def fused_rms_norm(x, weight, eps):
    """Return `model.rms_norm` in the dtype of matmuls, by torch's own kernel.

    The matmuls that follow then share one rounded tensor, where autocast makes one for each.
    """
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(matmul_dtype(x))


def rms_norm(x, weight, eps):
    """Return `fused_rms_norm`; on a CPU the gradient of torch's own takes ten times as long."""
    return called(_RMSNorm, x.float(), weight.float(), eps).to(matmul_dtype(x))


FORGETFUL = SimpleNamespace(save_for_backward=lambda *_: None)


def called(function, *args):
    """Return `function.apply(*args)`, without a gradient by its forward pass alone.

    The way through autograd would be a tenth of a short query's time.
    """
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(FORGETFUL, *args)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)              # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        product = grad * x                                                  # (..., D)
        along = (product @ weight)[..., None] * scale.pow(3) / x.shape[-1]  # (..., 1)
        to_weight = scale.reshape(-1) @ product.reshape(-1, x.shape[-1])    # (D,)
        return (grad * weight).mul_(scale).addcmul_(x, along, value=-1), to_weight, None


def rope(x, cos, sin):
    """Return `model.rope`, computed in the dtype of x; the gradient is the rotation back."""
    return called(_Rope, x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rope.turn(x, cos.to(x.dtype), sin.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rope.turn(grad, cos.to(grad.dtype), -sin.to(grad.dtype)), None, None

    @staticmethod
    def turn(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return (x * cos).addcmul_(torch.cat([-b, a], dim=-1), sin)


def swiglu(gate, up):
    """Return `model.swiglu`; autograd would also keep silu(gate), (S, F)."""
    return called(_SwiGLU, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


# ---------------------------------------------------------------- matmuls of a finished model

def pack(model):
    """Lay the weights of a model's matmuls out for oneDNN once, for texts without a gradient.

    On a CPU torch would do so in every pass; in float32 it takes MKL, which is slower on many
    tokens. The parameters stay as they are.
    """
    onednn, weight = torch.ops.mkldnn, model.embed_tokens.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or \
            weight.dtype != torch.float32 and not onednn._is_mkldnn_bf16_supported():
        return
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            packed = onednn._reorder_linear_weight(layer.weight.detach(), 16_384)  # tokens a pass
            layer.forward = partial(packed_linear, layer.weight, layer.weight._version, packed)


def packed_linear(weight, version, packed, x):
    """Return x weight^T, x (S, D), weight (F, D): by the packed weight if it is still the same."""
    same = (x.dtype, x.device) == (packed.dtype, packed.device) and weight._version == version
    few = len(x) < FEW and x.dtype == torch.float32 and not is_amd()
    if torch.is_grad_enabled() or few or not same:
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


# ---------------------------------------------------------------- LM cross-entropy in chunks

def next_token_loss(hidden, weight, targets, chunk=None):
    """Return `model.next_token_loss`, and form its gradient, in chunks of tokens.

    Peak memory is chunk * V, not S * V (at V = 150,000 and S = 32,768: 20 GB in float32). The
    matmuls run in 16 bits under autocast, softmax and the sums in float32. The loss of a token
    counts 87.4 at most, as its probability is a float32; its gradient is exact.
    """
    predicted = targets != -100
    if not predicted.all():                                # SFT: a prompt needs no logits
        places = predicted.nonzero()[:, 0]
        hidden, targets = hidden.index_select(0, places), targets[places]
    chunk = chunk or logits_chunk(len(weight), hidden.device.type)
    hidden = hidden.to(matmul_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())


def logits_chunk(vocab_size, kind):
    """Return the tokens whose logits exist at a time: 64 MB of float32 on a CPU, 2 GB on a card.

    Fewer tokens would starve the matmuls. More would not make a small vocabulary's faster.
    """
    least, most, numbers = (128, 1024, 2 ** 24) if kind == "cpu" else (1024, 16_384, 2 ** 29)
    return min(max(numbers // vocab_size, least), most)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, is_training):
        count, tiny = max(len(targets), 1), torch.finfo(torch.float32).tiny
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_h = torch.empty_like(hidden) if is_training else hidden            # else unused
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if is_training else None
        cast = weight.to(hidden.dtype)
        for part, h, t in zip(grad_h.split(chunk), hidden.split(chunk), targets.split(chunk)):
            p, t = (h @ cast.T).float(), t[:, None]                             # (chunk, V)
            torch.softmax(p, dim=1, out=p)                  # in place: half of the memory
            total -= p.gather(1, t).clamp_min_(tiny).log_().sum()
            if not is_training:
                continue
            # d loss / d logits = (softmax - one-hot) / count; backward divides by the count
            g = p.scatter_add_(1, t, -torch.ones_like(t, dtype=torch.float32)).to(hidden.dtype)
            part.copy_(g @ cast)
            if h.dtype == grad_w.dtype:
                grad_w.addmm_(g.T, h)                       # without a second (V, D)
            else:
                grad_w += g.T @ h
            del p, g                                        # before the next ones are formed
        if is_training:
            ctx.save_for_backward(grad_h, grad_w.to(weight.dtype))
            ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx, grad):
        (grad_h, grad_w), grad = ctx.saved_tensors, grad / ctx.count
        return grad_h.mul_(grad), grad_w.mul_(grad), None, None, None   # in place: runs once
