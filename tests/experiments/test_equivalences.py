"""Different ways to the same numbers, and how far apart they are: the README's table.

    pytest tests/test_equivalences.py --record=results/equivalences.json

Errors are relative: the norm of the difference over the norm of the right side, in float32 unless
said otherwise. "Dense" is a model written out below, on padded texts, with every matrix in full.
"""
import json

import pytest
import torch
import torch.nn.functional as F

import train
from engine import checkpoint
from losses import cached_backward, info_nce, lm_cross_entropy
from mask import CAUSAL, FULL, MaskSpec, soft_mask
from model import Conan, ConanConfig, apply_rope, rope_cache
from ranks import arguments, on_ranks, run, write_rows

CONFIG = ConanConfig(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=40,
                     block_size=64)
LENGTHS = (3, 17, 1, 16, 9, 15, 17, 40)
SOFT = MaskSpec(0.4)


def model_of(dtype=torch.float32):
    """Weights large enough for attention to be far from uniform."""
    model, generator = Conan(CONFIG), torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2, generator=generator)
    return model.to(dtype)


def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 61, (n,), generator=generator) for n in LENGTHS]


def embed(model, some, mask):
    return model(torch.cat(some), [len(t) for t in some], mask)


def dense(model, some, mask):
    """Return the embeddings of padded texts: no groups, no flat list, no kernel, no shortcut."""
    c, longest, dtype = model.config, max(map(len, some)), model.embed_tokens.weight.dtype
    ids = torch.stack([F.pad(t, (0, longest - len(t)), value=7) for t in some])       # (B, T)
    real = torch.arange(longest) < torch.tensor([len(t) for t in some])[:, None]
    m = torch.zeros(len(some), 1, longest, longest, dtype=dtype)
    for b, t in enumerate(some):
        m[b, 0, :len(t), :len(t)] = soft_mask(len(t), mask.alpha).to(dtype)
    m = m + (~real).to(dtype).diag_embed()[:, None]            # a pad sees itself: no 0 / 0
    cos, sin = (x.to(dtype) for x in rope_cache(longest, c.head_dim, c.rope_base))

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * layer.weight

    x = model.embed_tokens(ids)
    for layer in model.layers:
        y, a = norm(x, layer.input_layernorm), layer.self_attn
        q, k, v = (linear(y).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for linear in (a.q_proj, a.k_proj, a.v_proj))                     # (B, H, T, E)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = (part.repeat_interleave(c.n_head // c.n_kv_head, 1) for part in (k, v))
        weights = m * (q @ k.transpose(2, 3) / c.head_dim ** 0.5).exp()              # (B, H, T, T)
        y = weights / weights.sum(-1, keepdim=True) @ v
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))
        y = norm(x, layer.post_attention_layernorm)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    x = norm(x, model.norm) * real[:, :, None]
    return x.sum(1) / real.sum(1, keepdim=True)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def with_gradient(embeddings, model):
    """Return the embeddings and the gradient of a loss that weighs each number differently."""
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (embeddings * weights.to(embeddings.dtype)).sum().backward()
    return embeddings, gradient(model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(record, name, found, right, bounds=(1e-5, 1e-5)):
    """Assert that (numbers, gradient) agree, and note by how much they do not, at worst."""
    errors = [relative(a, b) for a, b in zip(found, right)]
    before = record.setdefault(name, {"output": 0.0, "gradient": 0.0})
    record[name] = dict(zip(before, map(max, before.values(), errors)))
    for error, bound in zip(errors, bounds):
        assert error < bound


@pytest.mark.parametrize("mask", [CAUSAL, SOFT, FULL], ids=["causal", "soft", "full"])
def test_packed_is_padded_is_one_by_one(record, mask):
    model = model_of()
    packed = with_gradient(embed(model, texts(), mask), model)
    alone = with_gradient(torch.cat([embed(model, [t], mask) for t in texts()]), model)
    compare(record, "packed = padded = one by one", packed, alone)
    padded = with_gradient(dense(model, texts(), mask), model)
    compare(record, "packed = padded = one by one", packed, padded)


def test_soft_is_dense_in_float64(record):
    model = model_of()
    found = with_gradient(embed(model, texts(), SOFT), model)
    double = model_of(torch.float64)
    right = with_gradient(dense(double, texts(), SOFT), double)
    compare(record, "soft mask = dense, in float64", found, right)
    other = with_gradient(dense(double, texts(), MaskSpec(0.5)), double)
    assert relative(found[0], other[0]) > 1e-3                 # else nothing here would be soft


def test_cached_is_direct(record):
    model, some, results = model_of(), texts(), []
    for size in (3, len(some)):                                # three chunks; one pass
        model.zero_grad()
        chunks = [some[i:i + size] for i in range(0, len(some), size)]
        loss, _ = cached_backward(lambda chunk: embed(model, chunk, SOFT), chunks,
                                  lambda x: info_nce(x[:4], x[4:], temperature=0.1))
        results.append((loss, gradient(model)))
    compare(record, "cached (two passes) = direct", *results)


def test_chunked_is_plain(record):
    generator = torch.Generator().manual_seed(4)
    targets, results = torch.randint(0, 500, (300,), generator=generator), []
    targets[::7] = -100
    hidden, weight = (torch.randn(n, 32, generator=generator).requires_grad_() for n in (300, 500))
    for loss in (lm_cross_entropy(hidden, weight, targets, chunk=64),
                 F.cross_entropy(hidden @ weight.T, targets)):
        results.append((loss, torch.cat([g.flatten() for g in
                                         torch.autograd.grad(loss, (hidden, weight))])))
    compare(record, "chunked = plain cross-entropy", *results)


def test_ddp_is_zero1_is_fsdp_is_one_process(record, tmp_path):
    """Losses, and what the weights have moved by, after six steps of stage 4 on two processes."""
    write_rows(tmp_path)
    found = {}
    for mode, size in (("single", 1), ("ddp", 2), ("zero1", 2), ("fsdp", 2)):
        argv = arguments(tmp_path, "embed_sup", tmp_path / mode, "--steps=6", "--warmup=0",
                         f"--parallel={'ddp' if size == 1 else mode}")
        on_ranks(size, run, argv)
        lines = open(tmp_path / mode / "embed_sup/log.jsonl")
        weights = checkpoint.load(checkpoint.latest(tmp_path / mode / "embed_sup"), "model.pt")
        found[mode] = (torch.tensor([json.loads(line)["loss"] for line in lines]),
                       torch.cat([w.flatten() for w in weights.values()]))
    cfg = train.load_config(train.TrainConfig, argv)
    train.distributed.seed_everything(cfg.seed)
    start = Conan(cfg.model_config()).init_weights()
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert relative(found["single"][1], start) > 1e-2          # it has moved
    for mode in ("ddp", "zero1", "fsdp"):
        compare(record, "DDP = ZeRO-1 = FSDP2 = one process",
                (found[mode][0], found[mode][1] - start),
                (found["single"][0], found["single"][1] - start), (1e-5, 1e-3))

