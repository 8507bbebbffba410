"""The model: a decoder with grouped-query attention that is an LM first and an embedder later.

PAPER Sec. 4.2: 8 layers, width 3584, 32 heads, 8 KV heads, FFN 8192, vocabulary 150,000, context
32,768. The defaults of `ConanConfig` are that model. RoPE (rotate-half), RMSNorm, SwiGLU, no
biases, tied embeddings: the Llama tensor layout, so that an export is a copy.
UNSPECIFIED: activation, norm and tying; SwiGLU + tied + head dim 112 gives 1,499.2M parameters, the
one combination next to Table 5's 1503M.

Texts come as one flat list of tokens and their lengths, so there is no padding to leak and none to
pay for: linear layers see (S, D), attention sees groups of texts of like lengths, or on CUDA the
list itself (attention.py). One `forward` serves the LM loss and the embedding, because DDP and FSDP
hook nothing but `forward`.

B texts, S tokens of all texts, T tokens of the longest text of a group, D width, H heads,
K key/value heads, E head dim, F ffn dim, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine import flash
from losses import lm_cross_entropy
from mask import FULL, future_weight, mask_weights


@dataclass(frozen=True)
class ConanConfig:
    """The shape of a model; the defaults are PAPER Sec. 4.2."""
    vocab_size: int = 150_000
    n_layer: int = 8
    n_head: int = 32
    n_kv_head: int = 8
    n_embd: int = 3584
    ffn_dim: int = 8192
    attention_dim: int = 0         # of all heads together; 0: n_embd
    block_size: int = 32_768       # longest text in tokens; longer ones are cut by the caller
    rope_base: float = 10_000.0    # UNSPECIFIED
    norm_eps: float = 1e-5         # a token far below its square root keeps its own length
    embed_std: float = 0.02        # initial token embeddings; see `Conan.rank_scale`
    embed_rank_power: float = 0.0
    pooling: str = "mean"          # UNSPECIFIED: "mean" over tokens, or the "last" token

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim",
                     "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        name = "attention_dim" if self.attention_dim else "n_embd"
        if getattr(self, name) % self.n_head or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"{name} {getattr(self, name)} must be n_head {self.n_head} times an "
                             "even head dim")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling {self.pooling!r} is unknown; choose mean or last")

    @property
    def head_dim(self):
        """Return E, the width of one head."""
        return (self.attention_dim or self.n_embd) // self.n_head


# ---------------------------------------------------------------- texts of unequal length

@dataclass
class Group:
    """Texts of like lengths that attention treats as one padded (B, T) block."""
    lengths: torch.Tensor          # (B,) int64
    tokens: torch.Tensor | None    # (B, T) bool, True = token; None when there are no pads
    shape: tuple                   # (B, T)
    bias: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class Packing:
    """Where each text lies in the flat list, and which texts attention takes together.

    `order` sorts the texts by falling length, so that a group is a contiguous stretch of the flat
    list; `Conan.forward` applies it on entry and undoes it on the embeddings. `padded` holds, for
    all groups one after the other, the flat place of each of their B * T places (P in all; a pad
    repeats a token), `flat` the place among those P of each flat token, `real` which are tokens.
    On CUDA there may be no groups: `texts` then says where the texts of the flat list start.
    """
    WASTE = 0.85                   # the shortest text of a group has at least this share of T

    def __init__(self, lengths, device):
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        if lengths.dim() != 1 or not len(lengths) or int(lengths.min()) < 1:
            raise ValueError("lengths must be a non-empty list of positive token counts")
        self.order = torch.argsort(lengths, descending=True, stable=True)
        self.lengths = lengths[self.order]
        starts = self.lengths.cumsum(0) - self.lengths
        given = (lengths.cumsum(0) - lengths)[self.order]
        self.text = torch.repeat_interleave(torch.arange(len(lengths)), self.lengths)     # (S,)
        self.position = torch.arange(int(lengths.sum())) - starts[self.text]              # (S,)
        self.source = given[self.text] + self.position                                    # (S,)
        self.last = starts + self.lengths - 1                                             # (B,)
        self.mask = self.texts = self.groups = None
        for name in ("order", "text", "position", "source", "last"):
            setattr(self, name, getattr(self, name).to(device))
        self.counts = self.lengths.to(device)
        if torch.device(device).type != "cuda":
            self._form_groups(device)

    def _form_groups(self, device):
        """Lay the texts out as padded groups."""
        starts = self.lengths.cumsum(0) - self.lengths
        self.groups, padded, real = [], [], []
        for first, end in self._ranges():
            inside = self.lengths[first:end]
            at = torch.arange(int(inside[0]))
            tokens = at[None, :] < inside[:, None]                                        # (B, T)
            padded.append(torch.where(tokens, starts[first:end, None] + at, starts[first]))
            real.append(tokens.reshape(-1))
            self.groups.append(Group(inside.to(device), None if bool(tokens.all()) else
                                     tokens.to(device), tuple(tokens.shape)))
        self.real = torch.cat(real)                                                       # (P,)
        self.padded = torch.cat([p.reshape(-1) for p in padded])                          # (P,)
        self.flat = self.real.nonzero()[:, 0]                                             # (S,)
        self.is_dense = len(self.flat) == len(self.padded)
        for name in ("padded", "real", "flat"):
            setattr(self, name, getattr(self, name).to(device))

    def _ranges(self):
        """Yield (first, end) of each group of the sorted texts."""
        sizes, first = self.lengths.tolist(), 0
        for i in range(1, len(sizes) + 1):
            if i == len(sizes) or sizes[i] < self.WASTE * sizes[first] - 2:
                yield first, i
                first = i

    def set_mask(self, mask, dtype):
        """Form what attention needs of the mask, once a batch; every layer then shares it.

        Packed texts: the weight of each token's future, (S,). Groups: causal and bidirectional ones
        without pads need no tensor. Pads are on the right, so a causal group needs none either.
        Soft: log M of each text's own length, (B, 1, T, T).
        """
        self.mask, device = mask, self.position.device
        if takes_packed_texts(device, dtype):
            self.texts = flash.Texts(self.lengths, device)
            if not (mask.is_causal or mask.is_full):
                own = self.counts[self.text].float()                            # l of each token
                self.texts.weigh(future_weight(self.position, own, mask.alpha), mask.axis)
            return
        if self.groups is None:
            self._form_groups(device)
        for group in self.groups:
            group.bias = group.weights = None
            b, t = group.shape
            if group.tokens is not None and not mask.is_causal:
                closed = torch.zeros(b, 1, 1, t, dtype=dtype, device=group.lengths.device)
                group.bias = closed.masked_fill(~group.tokens[:, None, None], -torch.inf)
            if not (mask.is_causal or mask.is_full):
                at = torch.arange(t, device=group.lengths.device)
                own = group.lengths if group.tokens is not None else group.lengths[:1]   # all equal
                weights = mask_weights(at[:, None], at[None], own[:, None, None].float(),
                                       mask.alpha, mask.axis)[:, None]       # (B or 1, 1, T, T)
                if mask.apply == "logits":
                    group.weights = weights
                else:
                    bias = weights.log().to(dtype)
                    group.bias = bias if group.bias is None else bias + group.bias


class _Pad(torch.autograd.Function):
    """Lay flat tokens (S, ...) out as the groups' padded places (P, ...).

    What a pad holds never reaches a loss, so the gradient is a plain look-up, not a scatter.
    """

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.padded)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.packing.flat), None


class _Unpad(torch.autograd.Function):
    """Take the tokens (S, D) out of the padded places (P, D); the gradient of a pad is zero."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x.index_select(0, packing.flat)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.packing.padded)
        return grad.masked_fill_(~ctx.packing.real[:, None], 0), None


# ---------------------------------------------------------------- attention

def explicit_attention(q, k, v, bias=None, is_causal=False, weights=None):
    """Return softmax(q k^T / sqrt(E) [* weights] + bias) v, every step written out.

    q: (B, H, T, E), k, v: (B, K, T, E) with H a multiple of K; bias, weights: broadcastable to
    (B, 1, T, T). The reference for every faster path, and on CPU the fastest one for short texts.
    """
    b, h, t, e = q.shape
    kv = k.shape[1]
    q = (q * (1.0 / math.sqrt(e))).reshape(b, kv, h // kv * t, e)           # heads share a key
    logits = (q @ k.transpose(-2, -1)).view(b, kv, h // kv, t, t)           # (B, K, H/K, T, T)
    if weights is not None:
        logits = logits * weights[:, :, None]
    if is_causal:
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    elif bias is not None:
        logits = logits + bias[:, :, None]
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
    return (probs.reshape(b, kv, h // kv * t, t) @ v).view(b, h, t, e)


def takes_packed_texts(device, dtype):
    """Tell whether attention takes the flat list: flash attention is for 16 bits on CUDA."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def attend_packed(q, k, v, texts, mask):
    """Choose the attention kernel of packed texts; q (S, H, E), k, v (S, K, E) -> like q.

    Causal and bidirectional: flash attention, no mask tensor. Soft: two calls of it. Multiplied
    logits: FlexAttention. Never a (T, T) tensor.
    """
    if mask.is_causal or mask.is_full:
        t = texts.longest
        if t % 128 == 0 and t * len(texts.lengths) == len(q):               # windows of text
            return flash.equal_lengths(q, k, v, len(texts.lengths), mask.is_causal)
        return flash.packed(q, k, v, texts, "past" if mask.is_causal else "all")
    if mask.apply == "logits":
        return flash.flex(q, k, v, texts, "logits")
    return flash.packed(q, k, v, texts, "soft")


def attend(q, k, v, group, mask):
    """Choose the attention kernel of one group; q (B, H, T, E), k, v (B, K, T, E) -> like q.

    Measured on CPU: in bfloat16 below 256 tokens the plain matmuls beat SDPA 2 to 4 times.
    Multiplied logits exist in the explicit form only.
    """
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256
    if group.weights is not None or short:
        return explicit_attention(q, k, v, group.bias, mask.is_causal, group.weights)
    bias = group.bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True,
                                          is_causal=mask.is_causal and q.shape[2] > 1)


# ---------------------------------------------------------------- the layers

class RMSNorm(nn.Module):
    """Scale each vector to unit mean square in float32, then by a learned weight."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):                                                   # (..., D)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)
        y = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
        return y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm`, whose gradient on a CPU takes ten times as long as this one."""

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


def rope_cache(block_size, head_dim, base):
    """Return cos and sin, each (T, E) float32, of the angles t / base^(2i / E).

    The sines of the first half are negative, as `apply_rope` wants them.
    """
    frequency = base ** -(torch.arange(0, head_dim, 2).double() / head_dim)          # (E/2,)
    angle = torch.arange(block_size).double()[:, None] * frequency                   # (T, E/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=1).float(), torch.cat([-sin, sin], dim=1).float()


def apply_rope(x, cos, sin):
    """Rotate the halves of each head: x (S, H, E), cos and sin (S, 1, E) of `rope_cache`."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


class _Rope(torch.autograd.Function):
    """Apply `apply_rope` to the first `heads` of (S, H + 2K, E); values pass as they are.

    The gradient is the rotation back. Half the time of what autograd makes of the formula.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _Rope.turn(x, cos, sin, heads)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rope.turn(grad, cos, -sin, ctx.heads), None, None, None

    @staticmethod
    def turn(x, cos, sin, heads):
        out = torch.empty_like(x)
        a, b = x[:, :heads].chunk(2, dim=-1)
        torch.mul(x[:, :heads], cos, out=out[:, :heads]).addcmul_(torch.cat([b, a], dim=-1), sin)
        out[:, heads:] = x[:, heads:]
        return out


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, config):
        super().__init__()
        c, e = config, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, e
        self.q_proj = nn.Linear(c.n_embd, c.n_head * e, bias=False)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * e, bias=False)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * e, bias=False)
        self.o_proj = nn.Linear(c.n_head * e, c.n_embd, bias=False)

    def forward(self, x, packing, cos, sin):                                # (S, D)
        h, kv, e = self.n_head, self.n_kv_head, self.head_dim
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        qkv = F.linear(x, weight).view(len(x), h + 2 * kv, e)               # one matmul for three
        if torch.compiler.is_compiling():                                   # it fuses this itself
            qkv = torch.cat([apply_rope(qkv[:, :h + kv], cos, sin), qkv[:, h + kv:]], dim=1)
        else:
            qkv = _Rope.apply(qkv, cos, sin, h + kv)                        # (S, H + 2K, E)
        return self.o_proj(self.mix(qkv, packing))                          # (S, D)

    def mix(self, qkv, packing):
        """Let the tokens of each text look at each other: qkv (S, H + 2K, E) -> (S, D).

        The shapes in here change with every batch, so torch.compile leaves it alone.
        """
        heads, mask = [self.n_head, self.n_kv_head, self.n_kv_head], packing.mask
        if packing.texts is not None:
            return attend_packed(*qkv.split(heads, dim=1), packing.texts, mask).flatten(1)
        if not packing.is_dense:
            qkv = _Pad.apply(qkv, packing)                                  # (P, H + 2K, E)
        out = []
        sizes = [b * t for b, t in (group.shape for group in packing.groups)]
        for group, part in zip(packing.groups, qkv.split(sizes)):
            part = part.view(*group.shape, *part.shape[1:]).transpose(1, 2)    # (B, H + 2K, T, E)
            q, k, v = part.split(heads, dim=1)
            y = attend(q, k, v, group, mask)                                # (B, H, T, E)
            out.append(y.transpose(1, 2).flatten(2).flatten(0, 1))          # (B * T, D)
        y = torch.cat(out)
        return y if packing.is_dense else _Unpad.apply(y, packing)


class _SwiGLU(torch.autograd.Function):
    """Return silu(gate) * up of the halves of (S, 2F).

    Both gradients are written to one tensor: autograd would put them together by a copy, and keep
    silu(gate) for them.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)                                       # (S, F) each
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        both = grad.new_empty(len(grad), 2 * grad.shape[1])
        to_gate, to_up = both.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=to_gate)
        return both


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):                                                   # (S, D)
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        both = F.linear(x, weight)                                          # (S, 2F)
        if torch.compiler.is_compiling():                                   # it fuses this itself
            gate, up = both.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(_SwiGLU.apply(both))                          # (S, F) -> (S, D)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, packing, cos, sin):                                # (S, D)
        x = x + self.self_attn(self.input_layernorm(x), packing, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Conan(nn.Module):
    """The language model and, after stage 3, the embedder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False     # recompute each block in backward: memory for time
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self._rope = {}                # per device; not a buffer, so nothing is broadcast

    def init_weights(self, generator=None):
        """Draw the weights: every matrix from N(0, 0.02), norms at 1.

        The projections that write to the residual stream (o_proj, down_proj) are scaled by
        1 / sqrt(2 * n_layer), so that its variance does not grow with depth.
        """
        with torch.no_grad():
            for name, value in self.fresh_weights(generator):
                self.get_parameter(name).copy_(value)
        return self

    def fresh_weights(self, generator=None):
        """Yield (name, initial value) of each parameter, on the CPU, one at a time."""
        for name, p in self.named_parameters():
            value = torch.ones(p.shape, device="cpu")
            if p.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                value.normal_(std=std, generator=generator)
            if name == "embed_tokens.weight":
                value *= self.rank_scale()[:, None] * (self.config.embed_std / 0.02)
            yield name, value

    def rank_scale(self):
        """Return the (V,) float32 factors of the initial token embeddings, rare tokens' near 1.

        BPE numbers tokens by falling frequency, so log(rank) / log(V) grows with a token's rarity
        as IDF does. With its power as the length of a vector, and a `norm_eps` large enough for
        lengths to outlive the norms, the mean over a text starts as a bag of words weighted by IDF.
        Power 0, the default, is the usual initialisation.
        """
        rank = torch.arange(2, self.config.vocab_size + 2, dtype=torch.float32, device="cpu")
        return (rank.log() / rank[-1].log()) ** self.config.embed_rank_power

    @staticmethod
    def skip_constructor(config):
        """Draw, block by block, the random numbers that constructing a model in memory draws.

        On the meta device nothing is drawn; after this, `fresh_weights` are the same there.
        """
        nn.Embedding(config.vocab_size, config.n_embd)
        for _ in range(config.n_layer):
            Block(config)

    def count_params(self):
        """Return the number of parameters; the tied output embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids, lengths, mask=FULL, targets=None):
        """Return the LM loss if `targets` are given, else one embedding per text.

        ids: (S,) int64, all texts one after the other; lengths: B token counts that sum to S.
        mask: the `MaskSpec` of every layer. targets: (S,) int64, -100 where nothing is predicted.
        Returns a float32 scalar, or (B, D) float32, not normalised, in the order of the texts.
        """
        packing = Packing(lengths, ids.device)
        if len(packing.source) != len(ids):
            raise ValueError(f"lengths sum to {len(packing.source)} but there are {len(ids)} ids")
        if int(packing.lengths[0]) > self.config.block_size:
            raise ValueError(f"a text of {int(packing.lengths[0])} tokens exceeds block_size "
                             f"{self.config.block_size}")
        hidden = self.hidden(ids[packing.source], packing, mask)            # (S, D)
        if targets is not None:
            targets = targets[packing.source]
            if (targets == -100).any():                # SFT: a prompt needs no logits
                hidden, targets = hidden[targets != -100], targets[targets != -100]
            return lm_cross_entropy(hidden, self.embed_tokens.weight, targets)
        pooled = pool(hidden, packing, self.config.pooling)                 # (B, D)
        return torch.empty_like(pooled).index_copy(0, packing.order, pooled)

    def hidden(self, ids, packing, mask):
        """Return the last hidden states (S, D) of sorted flat `ids`, after the final norm."""
        x = self.embed_tokens(ids)                                          # (S, D)
        dtype = torch.get_autocast_dtype(x.device.type) \
            if torch.is_autocast_enabled(x.device.type) else x.dtype
        packing.set_mask(mask, dtype)
        cos, sin = (c[packing.position][:, None].to(dtype) for c in self._cos_sin(x.device))
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, packing, cos, sin, use_reentrant=False)
            else:
                x = block(x, packing, cos, sin)
        return self.norm(x).to(dtype)

    def _cos_sin(self, device):
        if device not in self._rope:
            cos, sin = rope_cache(self.config.block_size, self.config.head_dim,
                                  self.config.rope_base)
            self._rope[device] = (cos.to(device), sin.to(device))
        return self._rope[device]


def pool(hidden, packing, how="mean"):
    """Return (B, D) float32 from hidden states (S, D): mean over a text's tokens, or its last one.

    UNSPECIFIED in the paper. At alpha = 0 the last token is the only one that has seen the text.
    """
    hidden = hidden.float()
    if how == "last":
        return hidden[packing.last]
    total = hidden.new_zeros(len(packing.counts), hidden.shape[1])
    return total.index_add(0, packing.text, hidden) / packing.counts[:, None]


def flatten(ids, pad):
    """Return (flat ids (S,), lengths (B,)) of padded `ids` (B, T); `pad` (B, T), True = token.

    Padding may be on either side; what a pad holds cannot matter, as it is not there any more.
    """
    if ids.shape != pad.shape or pad.dtype != torch.bool:
        raise ValueError(f"pad must be a bool tensor of the shape {tuple(ids.shape)} of ids")
    return ids[pad], pad.sum(1).cpu()
