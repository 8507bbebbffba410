"""Packed attention: two calls of flash attention against softmax written out.

The kernels run on CUDA only. What this project adds to them (texts, windows, weights, merging, both
passes of backward) runs here on stand-ins of the same interface, in float64; the tests at the end
run the kernels themselves where there is a GPU.
"""

import math

import pytest
import torch

from engine import flash, kernels
from mask import CAUSAL, FULL, MaskSpec, future_weight, soft_mask
from tiny import Largest, relative, tiny

H, K, E = 4, 2, 8
LENGTHS = [[9], [1], [1, 1, 1], [5, 1, 12, 2], [7, 7, 7], [130, 1, 60]]
ALPHAS = [1e-6, 0.05, 0.3, 0.5, 0.77, 1 - 1e-6]
each_axis = pytest.mark.parametrize("axis", ["row", "col"])
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def window(see, n, device):
    """Which keys (columns) a query (row) sees, as flash attention's windows define it."""
    every = torch.ones(n, n, dtype=torch.bool, device=device)
    return {"all": every, "past": every.tril(), "future": every.triu()}[see]


def plain_flash(qkv, span):
    """Return what `flash.flash` promises, by plain matmuls; every row has a key."""
    (q, k, v), starts = qkv, span.starts
    share = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=q.dtype)
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()):
        assert b - a <= span.longest
        for h in range(q.shape[1]):
            logits = span.scale * q[a:b, h] @ k[a:b, h // share].T
            logits = logits.masked_fill(~window(span.see, b - a, q.device), -torch.inf)
            out[a:b, h] = logits.softmax(1) @ v[a:b, h // share]
            lse[h, a:b] = logits.logsumexp(1)
    return out, lse


def plain_flash_backward(grad, qkv, out, lse, span):
    """Return what flash attention's backward computes from any out and lse."""
    (q, k, v), starts, scale = qkv, span.starts, span.scale
    share = q.shape[1] // k.shape[1]
    assert lse.shape == (q.shape[1], len(q)) and out.shape == q.shape
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()):
        assert b - a <= span.longest
        for h in range(q.shape[1]):
            key, value = k[a:b, h // share], v[a:b, h // share]
            p = (scale * q[a:b, h] @ key.T - lse[h, a:b, None]).exp()
            p = p * window(span.see, b - a, q.device)
            mean = (grad[a:b, h] * out[a:b, h]).sum(1, keepdim=True)
            d = scale * p * (grad[a:b, h] @ value.T - mean)
            dq[a:b, h] += d @ key
            dk[a:b, h // share] += d.T @ q[a:b, h]
            dv[a:b, h // share] += p.T @ grad[a:b, h]
    return dq, dk, dv


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(flash, "flash", plain_flash)
    monkeypatch.setattr(flash, "flash_backward", plain_flash_backward)


def texts_of(lengths, mask=FULL, device="cpu"):
    """Return `Texts`; on the CPU with float64 weights, so that small errors show."""
    texts = flash.Texts(lengths, mask, device)
    if texts.weight is not None and device == "cpu":
        position = torch.cat([torch.arange(n) for n in lengths]).double()
        own = torch.cat([torch.full((n,), n) for n in lengths]).double()
        texts.weight = future_weight(position, own, mask.alpha)
    return texts


def written_out(q, k, v, lengths, mask):
    """Softmax of each text and head with the mask that Eq. (4) prints, in float64."""
    out, start = [], 0
    for n in lengths:
        m = soft_mask(n, mask.alpha, mask.axis).to(q.device)
        own = slice(start, start + n)
        start += n
        heads = []
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            logits = q[own, h].double() @ k[own, g].double().T / math.sqrt(q.shape[-1])
            e = torch.exp(logits * m) if mask.apply == "logits" else m * torch.exp(logits)
            heads.append(e / e.sum(1, keepdim=True) @ v[own, g].double())
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


def qkv_of(lengths, dtype=torch.float64, device="cpu", e=E):
    """Return q, k, v as the model has them: views of one tensor."""
    whole = torch.randn(sum(lengths), H + 2 * K, e, dtype=torch.float64).to(device, dtype)
    return [x.requires_grad_() for x in whole.split([H, K, K], dim=1)]


def run(path, qkv):
    """Return the output and the gradients of a random direction, the same for all paths."""
    out = path(*qkv)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad((out * direction.to(out.device, out.dtype)).sum(), qkv)]


# ---------------------------------------------------------------- two calls, one softmax

@each_lengths
@pytest.mark.parametrize("mask", [FULL, CAUSAL, *(MaskSpec(a, axis) for a in ALPHAS
                                                  for axis in ("row", "col"))], ids=str)
@pytest.mark.parametrize("e", [E, 6])              # 6 is no multiple of eight
def test_packed_texts_are_softmax_forward_and_backward(plain_kernels, lengths, mask, e):
    qkv, texts = qkv_of(lengths, e=e), texts_of(lengths, mask)
    got = run(lambda q, k, v: flash.packed(q, k, v, texts), qkv)
    for a, b in zip(got, run(lambda q, k, v: written_out(q, k, v, lengths, mask), qkv)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@each_axis
def test_parts_of_the_heads_give_the_same(plain_kernels, monkeypatch, axis):
    """Long texts take the heads in several calls, so that temporaries stay small."""
    lengths = [5, 1, 12, 2]
    qkv, texts = qkv_of(lengths), texts_of(lengths, MaskSpec(0.3, axis))
    whole = run(lambda q, k, v: flash.packed(q, k, v, texts), qkv)
    monkeypatch.setattr(flash, "_parts", lambda q, k: [
        (slice(2 * g, 2 * g + 2), slice(g, g + 1)) for g in range(K)])
    for a, b in zip(run(lambda q, k, v: flash.packed(q, k, v, texts), qkv), whole):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tokens, calls", [(64, 1), (32_768, 8)])
def test_how_the_heads_are_parted(tokens, calls):
    with torch.device("meta"):
        parts = list(flash._parts(torch.empty(tokens, 32, 112), torch.empty(tokens, 8, 112)))
    assert len(parts) == calls
    assert [h for heads, _ in parts for h in range(32)[heads]] == list(range(32))
    for heads, group in parts:
        assert [h // 4 for h in range(32)[heads]] == [g for g in range(8)[group] for _ in range(4)]


def test_what_bfloat16_rounds_off_a_weight_is_kept_in_a_second_dim(plain_kernels):
    """log w times the square root of E is large; one bfloat16 of it would be 1 % off or more."""
    lengths, mask = [40], MaskSpec(1e-3, "col")
    q, k, v = (x.detach() for x in qkv_of(lengths))
    rough = [x.bfloat16().double() for x in (q, k, v)]
    texts = texts_of(lengths, mask)
    _, keys, _ = flash._future([x.bfloat16() for x in (q, k, v)], texts, E ** -0.5)
    high, low = keys[:, 0, E].double(), keys[:, 0, E + 1].double()
    want = texts.weight[texts.late].log() * E ** 0.5
    assert (high - want).abs().max() > 3e-3 and (high + low - want).abs().max() < 3e-4
    got = flash.packed(*rough, texts)
    assert torch.allclose(got, written_out(*rough, lengths, mask), atol=1e-9)


# ---------------------------------------------------------------- memory: nothing of T x T

@each_axis
@pytest.mark.parametrize("lengths", [[2000], [1500, 500]], ids=str)
def test_nothing_of_t_times_t_is_ever_made(monkeypatch, axis, lengths):
    """The kernels apart: they are replaced by some of the right shapes."""
    monkeypatch.setattr(flash, "flash", lambda qkv, span: (
        torch.zeros_like(qkv[0]), qkv[0].new_zeros(qkv[0].shape[1], len(qkv[0]))))
    monkeypatch.setattr(flash, "flash_backward", lambda grad, qkv, out, lse, span: [
        torch.zeros_like(x) for x in qkv])
    with Largest() as largest:
        qkv, texts = qkv_of(lengths), texts_of(lengths, MaskSpec(0.3, axis))
        run(lambda q, k, v: flash.packed(q, k, v, texts), qkv)
    assert largest.numel <= 2 * sum(lengths) * (H + 2 * K) * E < max(lengths) ** 2 / 4


# ---------------------------------------------------------------- the operators, without a GPU

@pytest.mark.parametrize("lengths", [[9], [1, 1], [5, 1, 12], [128, 128]], ids=str)
@pytest.mark.parametrize("mask", [CAUSAL, FULL, MaskSpec(0.3), MaskSpec(0.3, "col")], ids=str)
@pytest.mark.parametrize("e", [64, 20])
def test_torch_takes_these_arguments_and_returns_these_shapes(lengths, mask, e):
    """On "meta" torch runs its own operators by shape alone: the real signatures, no numbers."""
    qkv = qkv_of(lengths, torch.bfloat16, "meta", e)
    texts = flash.Texts(lengths, mask, "meta")
    out, *grads = run(lambda q, k, v: flash.packed(q, k, v, texts), qkv)
    assert (out.shape, out.dtype) == (qkv[0].shape, torch.bfloat16)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in qkv]


# ---------------------------------------------------------------- the whole model on packed texts

@pytest.mark.parametrize("lengths", [[9, 30, 1, 28], [12], [128, 128]], ids=str)
@pytest.mark.parametrize("mask", [CAUSAL, FULL, MaskSpec(0.3), MaskSpec(0.3, "col")], ids=str)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_model_on_packed_texts_is_the_model_on_groups(plain_kernels, monkeypatch, lengths, mask,
                                                        checkpointing):
    conan, ids = tiny(kernels.pick("cpu")).double(), torch.randint(0, 61, (sum(lengths),))
    conan.checkpointing = checkpointing
    results = []
    for packed in (False, True):
        monkeypatch.setattr(kernels, "takes_packed_texts", lambda *_: packed)
        conan.zero_grad()
        out = conan(ids, lengths, mask)
        (out.square() * torch.arange(1, 33)).sum().backward()
        results.append([out, *(p.grad.clone() for p in conan.parameters())])
    for a, b in zip(*results):
        assert relative(a, b) < 1e-6                           # pooling is in float32


def test_16_bits_on_cuda_are_packed_and_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)     # Ampere or newer
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    multiplied = MaskSpec(0.3, apply="logits")
    for kind, dtype, mask, packed in (
            ("cuda", torch.bfloat16, FULL, True), ("cuda", torch.float16, CAUSAL, True),
            ("cuda", torch.bfloat16, MaskSpec(0.3), True), ("cuda", torch.float32, FULL, False),
            ("cpu", torch.bfloat16, FULL, False), ("cuda", torch.bfloat16, multiplied, False),
            ("cuda", torch.bfloat16, MaskSpec(1.0, apply="logits"), True)):
        assert kernels.takes_packed_texts(torch.device(kind), dtype, mask) is packed
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert not kernels.takes_packed_texts(torch.device("cuda"), torch.bfloat16, FULL)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not kernels.takes_packed_texts(torch.device("cuda"), torch.bfloat16, FULL)


# ---------------------------------------------------------------- the kernels themselves

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = [[900], [5, 1, 300, 2], [1, 1], [256, 256]]


@needs_cuda
@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize("mask", [CAUSAL, FULL, *(MaskSpec(a, axis) for a in (0.01, 0.3, 0.9)
                                                  for axis in ("row", "col"))], ids=str)
@pytest.mark.parametrize("e", [64, 112])
def test_kernels_on_cuda_are_softmax_forward_and_backward(lengths, mask, e):
    qkv = qkv_of(lengths, torch.bfloat16, "cuda", e)
    texts = texts_of(lengths, mask, "cuda")
    got = run(lambda q, k, v: flash.attention(q, k, v, texts), qkv)
    want = run(lambda q, k, v: written_out(q, k, v, lengths, mask), qkv)
    for a, b in zip(got, want):
        a, b = a.double(), b.double()
        assert torch.isfinite(a).all()
        assert relative(a, b) < 0.01 or (a - b).abs().max() < 1e-3


@needs_cuda
@each_axis
def test_memory_on_cuda_grows_with_t_and_not_with_its_square(axis):
    peaks = []
    for t in (4096, 16_384):
        qkv = qkv_of([t], torch.bfloat16, "cuda", 64)
        texts = texts_of([t], MaskSpec(0.3, axis), "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash.packed(*qkv, texts)
        torch.autograd.grad(out.sum(), qkv)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0] and peaks[1] < 16_384 ** 2


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_cudnn_is_asked_on_hopper_alone(monkeypatch, capability):
    """On Blackwell it is wrong for few key/value heads: pytorch issue 193893."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels = [kernel.name for kernel in flash.backends(torch.device("cuda", 0))]
    rest = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert kernels == ["CUDNN_ATTENTION"] * (capability == (9, 0)) + rest
    assert [kernel.name for kernel in flash.backends(torch.device("cpu"))] == rest
