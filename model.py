"""The model: a decoder that is a language model first and an embedder later (PAPER Sec. 4.2).

8 layers of width 3584, 32 query heads over 8 key/value heads, feed-forward width 8192, RoPE,
RMSNorm, SwiGLU, no biases, tied embeddings. Tensor names are Llama's, so that an export is a copy.
UNSPECIFIED: activation, tying, norm, positions and biases. A gated feed-forward and tied embeddings
have 1,499.2M parameters; no other choice of these two comes close to Table 5's 1503M.

A batch is one flat list of tokens and the length of each text. Nothing is padded. This file does
everything the obvious way, by six operations. engine/kernels.py has the same six, faster; training
hands them in as `ops`. tests/engine/test_kernels.py compares the two.

Shapes: B texts, S tokens of all texts, T tokens of one text, D width, H query heads, K key/value
heads, E head dim, F ffn dim, V vocabulary.
"""
import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mask import FULL, soft_mask


@dataclass(frozen=True)
class ConanConfig:
    """The shape of a model; the defaults are PAPER Sec. 4.2."""
    vocab_size: int = 150_000
    n_layer: int = 8
    n_head: int = 32               # query heads
    n_kv_head: int = 8             # key/value heads
    n_embd: int = 3584
    ffn_dim: int = 8192
    block_size: int = 32_768       # the longest text, in tokens
    rope_base: float = 10_000.0    # UNSPECIFIED
    norm_eps: float = 1e-5         # UNSPECIFIED
    pooling: str = "mean"          # UNSPECIFIED: "mean" over tokens, or the "last" token
    pool_prompt: bool = False      # UNSPECIFIED: whether the mean includes the instruction

    def __post_init__(self):
        for name in "vocab_size n_layer n_head n_kv_head n_embd ffn_dim block_size".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be n_head {self.n_head} times an even "
                             "head dim")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling {self.pooling!r} is unknown; choose mean or last")

    @property
    def head_dim(self):
        """Return E, the width of one head."""
        return self.n_embd // self.n_head


# ---------------------------------------------------------------- the six operations, plainly

def prepare(lengths, mask, x):
    """Return what `attention` needs to know of the texts; called once a batch, for all layers.

    lengths: B token counts. x: (S, D), whose device and dtype a faster version looks at.
    """
    return lengths, mask


def rms_norm(x, weight, eps):
    """Divide each vector (..., D) by its root mean square in float32, then scale by weight (D,)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rope(x, cos, sin):
    """Rotate each head by its token's angles: x (S, H, E), cos and sin (S, 1, E) float32.

    Dim i is paired with dim i + E / 2, as in Llama.
    """
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def swiglu(gate, up):
    """Return silu(gate) * up, all (S, F)."""
    return F.silu(gate) * up


def attention(q, k, v, layout):
    """Return softmax(q k^T / sqrt(E) + log M) v of each text by itself, (S, H, E).

    q: (S, H, E), k, v: (S, K, E); layout: of `prepare`. PAPER Eq. 4 is M. H / K query heads share a
    key/value head (GQA).
    """
    lengths, mask = layout
    share = q.shape[1] // k.shape[1]
    out = []
    for qt, kt, vt in zip(q.split(lengths), k.split(lengths), v.split(lengths)):     # one text
        kt, vt = (x.repeat_interleave(share, dim=1) for x in (kt, vt))               # (T, H, E)
        logits = torch.einsum("ihe,jhe->hij", qt, kt).float() / math.sqrt(q.shape[-1])
        m = soft_mask(len(qt), mask.alpha, mask.axis).to(logits)                     # (T, T)
        logits = logits * m if mask.apply == "logits" else logits + m.log()          # (H, T, T)
        out.append(torch.einsum("hij,jhe->ihe", logits.softmax(dim=-1).to(v.dtype), vt))
    return torch.cat(out)


def next_token_loss(hidden, weight, targets):
    """Return the mean cross-entropy, a float32 scalar; 0 if there is nothing to predict.

    hidden: (S, D), weight: (V, D) the token embeddings, targets: (S,), -100 for no prediction.
    """
    logits = (hidden @ weight.T).float()                                             # (S, V)
    count = (targets != -100).sum().clamp(min=1)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count


OPERATIONS = (prepare, rms_norm, rope, swiglu, attention, next_token_loss)


# ---------------------------------------------------------------- the layers

class RMSNorm(nn.Module):
    """Scale each vector to unit mean square, then by a learned weight."""

    def __init__(self, config, ops):
        super().__init__()
        self.ops, self.eps = ops, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return self.ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config, ops):
        super().__init__()
        d, e = config.n_embd, config.head_dim
        self.ops, self.head_dim = ops, e
        self.q_proj = nn.Linear(d, config.n_head * e, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_head * e, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_head * e, bias=False)
        self.o_proj = nn.Linear(config.n_head * e, d, bias=False)

    def forward(self, x, layout, cos, sin):                                  # (S, D)
        q, k, v = (proj(x).unflatten(1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))     # (S, H or K, E)
        q, k = self.ops.rope(q, cos, sin), self.ops.rope(k, cos, sin)
        return self.o_proj(self.ops.attention(q, k, v, layout).flatten(1))   # (S, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config, ops):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):                                                   # (S, D)
        return self.down_proj(self.ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each on a normalised input."""

    def __init__(self, config, ops):
        super().__init__()
        self.input_layernorm = RMSNorm(config, ops)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = RMSNorm(config, ops)
        self.mlp = FeedForward(config, ops)

    def forward(self, x, layout, cos, sin):                                  # (S, D)
        x = x + self.self_attn(self.input_layernorm(x), layout, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Conan(nn.Module):
    """The language model and, after stage 3, the embedder.

    ops: an object with faster versions of some of the six operations; a missing one is the plain
    one. Passes of `checkpointing` tokens or more, if it is not 0, recompute each block in backward:
    less memory, more time.
    """

    def __init__(self, config, ops=None):
        super().__init__()
        ops = SimpleNamespace(**{f.__name__: getattr(ops, f.__name__, f) for f in OPERATIONS})
        self.config, self.ops, self.checkpointing = config, ops, 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.norm = RMSNorm(config, ops)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Give all parameters their `fresh_weights`; return the model."""
        for name, value in self.fresh_weights(generator):
            self.get_parameter(name).copy_(value)
        return self

    def fresh_weights(self, generator=None):
        """Yield (name, initial value on the CPU) of each parameter: N(0, 0.02^2), norms at 1.

        UNSPECIFIED: all of it. The two projections that write to the residual stream are smaller by
        sqrt(2 n_layer), so that its variance does not grow with depth.
        """
        for name, p in self.named_parameters():
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            value = torch.ones(p.shape, device="cpu")
            yield name, value if p.dim() == 1 else value.normal_(std=std, generator=generator)

    def count_params(self):
        """Return the number of parameters; the tied output embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids, lengths, mask=FULL, targets=None, skip=None):
        """Return the next-token loss if there are `targets`, else one embedding of each text.

        ids: (S,) int64, all texts one after the other. lengths: B token counts that sum to S.
        mask: the `MaskSpec` of every layer. targets: (S,) int64, -100 for no prediction.
        skip: B counts of leading tokens, a text's instruction, that the mean leaves out.
        One method does both, as DDP and FSDP act on `forward` alone.
        Returns a float32 scalar, or (B, D) float32, not normalised.
        """
        hidden = self.hidden(ids, lengths, mask)                            # (S, D)
        if targets is not None:
            return self.ops.next_token_loss(hidden, self.embed_tokens.weight, targets)
        if self.config.pooling == "last":
            skip = lengths                         # all but the last token, which pool always keeps
        elif self.config.pool_prompt:
            skip = None
        return pool(hidden, lengths, skip)

    def hidden(self, ids, lengths, mask):
        """Return the last layer's states (S, D), after the final norm; see `forward`.

        Raises ValueError for lengths that do not fit the ids, or a text longer than block_size.
        """
        if min(lengths, default=0) < 1 or sum(lengths) != len(ids):
            raise ValueError(f"lengths must be positive token counts that sum to the {len(ids)} "
                             f"ids, not {lengths}")
        if max(lengths) > self.config.block_size:
            raise ValueError(f"a text of {max(lengths)} tokens exceeds block_size "
                             f"{self.config.block_size}")
        x = self.embed_tokens(ids)                                          # (S, D)
        position = torch.cat([torch.arange(n) for n in lengths]).to(ids.device)      # (S,)
        tables = rope_angles(self.config.block_size, self.config.head_dim, self.config.rope_base,
                             ids.device)
        cos, sin = (table[position].unsqueeze(1) for table in tables)                # (S, 1, E)
        layout = self.ops.prepare(lengths, mask, x)
        recompute = 0 < self.checkpointing <= len(x) and torch.is_grad_enabled()
        for block in self.layers:
            if recompute:                      # no random number is drawn in a block
                x = checkpoint(block, x, layout, cos, sin, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, layout, cos, sin)
        return self.norm(x)


@functools.cache
def rope_angles(length, head_dim, base, device="cpu"):
    """Return cos and sin, each (length, E) float32: of pair i the angle t / base^(2i / E)."""
    frequency = base ** -(torch.arange(0, head_dim, 2).double() / head_dim)          # (E/2,)
    angle = torch.arange(length).double()[:, None] * frequency                       # (length, E/2)
    return [torch.cat([f, f], dim=1).float().to(device) for f in (angle.cos(), angle.sin())]


def pool(hidden, lengths, skip=None):
    """Return (B, D) float32: the mean of each text's states (S, D), from token `skip` on.

    A text's last token always counts, whatever its `skip`.
    """
    skip = [min(s, n - 1) for s, n in zip(skip or [0] * len(lengths), lengths)]      # B counts
    share = torch.cat([(torch.arange(n) >= s) / (n - s) for s, n in zip(skip, lengths)])  # (S,)
    text = torch.repeat_interleave(torch.tensor(lengths))      # (S,) which text a token is of
    share, text = share.to(hidden.device), text.to(hidden.device)
    total = torch.zeros(len(lengths), hidden.shape[1], device=hidden.device)         # (B, D)
    return total.index_add(0, text, hidden.float() * share[:, None])
