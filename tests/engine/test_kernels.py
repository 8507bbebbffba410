"""The fast operations against the plain ones of model.py, forward and backward; their parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as plain
from engine import kernels
from engine.kernels import Layout, next_token_loss
from mask import CAUSAL, FULL, MaskSpec
from tiny import MASKS, relative, texts_of, tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]
LENGTHS = {"equal": [9, 9, 9], "ragged": [4, 9, 2, 8, 1], "one-token": [1],
           "middle": [250, 240, 245, 20, 230, 238], "long": [300, 20, 290]}


def run(ops, lengths, mask, dtype, device):
    """Return embeddings, LM loss and the gradients of both, by the given operations."""
    model = tiny(ops).to(device)
    ids = torch.cat(texts_of(*lengths)).to(device)
    targets = ids.roll(-1).masked_fill(torch.arange(len(ids), device=device) % 4 == 0, -100)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        vectors, loss = model(ids, lengths, mask), model(ids, lengths, mask, targets)
    ((vectors * torch.arange(1, 33, device=device)).sum() + 100 * loss).backward()
    return {"embeddings": vectors, "loss": loss} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_is_plain_forward_and_backward(mask, lengths, dtype, close, device):
    """On CUDA in bfloat16 this is flash attention. bfloat16 rounds each operation to 3 digits."""
    fast = run(kernels.pick(device), lengths, mask, dtype, device)
    slow = run(None, lengths, mask, dtype, device)
    for name, want in slow.items():
        assert torch.isfinite(fast[name]).all() and fast[name].dtype == want.dtype
        if want.norm() > 1e-6:                              # a lone token has no gradient in q, k
            assert relative(fast[name], want) < close, name


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_both_kernels_of_a_cpu_without_a_gradient_are_plain(mask, has_amx, monkeypatch):
    """SDPA where it can use AMX, plain matmuls elsewhere; both run on any CPU."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "has_amx", lambda: has_amx)
    ids, calls, sdpa = torch.cat(texts_of(23, 40, 9, 39)), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **rest: calls.append(1) or sdpa(*args, **rest))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast, slow = (tiny(ops)(ids, [23, 40, 9, 39], mask) for ops in (kernels.pick("cpu"), None))
    assert relative(fast, slow) < 0.05
    assert bool(calls) == (has_amx and (mask.apply == "weights" or mask.is_full))


def test_what_torch_compile_fuses_is_left_plain():
    ops = plain.Conan(tiny().config, kernels.pick("cpu", compile=True)).ops
    assert (ops.rms_norm, ops.rope, ops.swiglu) == (plain.rms_norm, plain.rope, plain.swiglu)
    assert ops.prepare is kernels.prepare and ops.next_token_loss is kernels.next_token_loss
    fast = plain.Conan(tiny().config, kernels.pick("cpu")).ops
    assert all(getattr(fast, f.__name__) is not f for f in plain.OPERATIONS)


def test_gradients_written_by_hand_are_those_of_the_formulas():
    torch.manual_seed(0)
    x, w = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 8), 8))
    angles = torch.randn(5, 1, 2, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    heads = torch.randn(5, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.allclose(kernels._RMSNorm.apply(x, w, 1e-5), F.rms_norm(x, (8,), w, 1e-5))
    assert torch.allclose(kernels.rope(heads, cos, sin), plain.rope(heads, cos, sin))
    assert torch.allclose(kernels.swiglu(x, x + 1), plain.swiglu(x, x + 1))
    assert torch.autograd.gradcheck(lambda a, b: kernels._RMSNorm.apply(a, b, 1e-5), (x, w))
    assert torch.autograd.gradcheck(lambda a: kernels.rope(a, cos, sin), (heads,))
    assert torch.autograd.gradcheck(lambda a: kernels.swiglu(a, a.square()), (x,))


# ---------------------------------------------------------------- where texts lie

def layout_of(lengths, mask=FULL, dtype=torch.float32):
    return Layout(lengths, mask, torch.device("cpu"), dtype)


@pytest.mark.parametrize("is_amd", [False, True])
@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_packed_weights_give_the_same_vectors_and_leave_training_alone(
        dtype, close, is_amd, monkeypatch):
    """The packed copy serves texts without a gradient; parameters and gradients stay."""
    monkeypatch.setattr(kernels, "is_amd", lambda: is_amd)
    lengths, calls = [19, 4, 17], []
    ids = torch.cat(texts_of(*lengths))
    packed, model = (tiny(kernels.pick("cpu")).to(getattr(torch, dtype)) for _ in range(2))
    kernels.pack(packed)
    linear = F.linear
    with torch.no_grad():
        want = model(ids, lengths, FULL)
        monkeypatch.setattr(F, "linear", lambda *args: calls.append(1) or linear(*args))
        assert relative(packed(ids, lengths, FULL), want) < close and not calls
        few = packed(ids[:19], lengths[:1], FULL)
        assert relative(few, want[:1]) < close
        assert bool(calls) == (dtype == "float32" and not is_amd)
        calls.clear()
    packed(ids, lengths, FULL).square().sum().backward()
    model(ids, lengths, FULL).square().sum().backward()
    for (name, p), q in zip(packed.named_parameters(), model.parameters()):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad), name
    with torch.no_grad():                              # a changed weight is not the packed one
        for p in packed.parameters():
            p.mul_(1.5)
        assert relative(packed(ids, lengths, FULL), want) > 0.1 and calls


def test_a_layout_by_hand():
    layout = layout_of([2, 19, 3, 18])
    assert [g.shape for g in layout.groups] == [(2, 19), (2, 3)]
    # the texts start at 0, 2, 21 and 24 of the list; the last slot of each block is a pad
    tokens = [*range(2, 21), *range(24, 42), None, *range(21, 24), 0, 1, None]
    assert layout.is_token.tolist() == [t is not None for t in tokens]
    assert layout.token_of_slot[layout.is_token].tolist() == [t for t in tokens if t is not None]
    assert layout.slot_of_token.tolist() == [tokens.index(t) for t in range(42)]
    assert layout.groups[0].bias[1].flatten().tolist() == [0] * 18 + [-torch.inf]
    assert not layout.is_dense and layout_of([19, 19, 2]).is_dense
    assert not layout_of([2, 19, 19]).is_dense              # no pads, but another order


def test_groups_hold_every_text_once_and_few_pads():
    lengths = torch.randint(1, 200, (300,))
    layout = layout_of(lengths.tolist())
    slots = sum(b * t for b, t in (g.shape for g in layout.groups))
    assert lengths.sum() <= slots == len(layout.token_of_slot) < 1.15 * lengths.sum()
    assert torch.equal(layout.token_of_slot[layout.slot_of_token],
                       torch.arange(int(lengths.sum())))


def test_no_mask_tensor_where_none_is_needed():
    for mask, lengths, has_bias in ((CAUSAL, [9, 8], False), (FULL, [9, 9], False),
                                    (FULL, [9, 8], True), (MaskSpec(0.3), [9, 9], True)):
        group, = layout_of(lengths, mask).groups
        assert (group.bias is not None) == has_bias and group.weights is None


def test_log_m_is_formed_once_a_batch_and_once_for_equal_lengths(monkeypatch):
    """Not in each of the two layers; and texts of one length share one (T, T)."""
    shapes, real = [], kernels.mask_weights

    def note(*args):
        shapes.append(tuple(real(*args).shape))
        return real(*args)
    monkeypatch.setattr(kernels, "mask_weights", note)
    lengths = [9, 9, 9, 30, 29]
    tiny(kernels.pick("cpu"))(torch.cat(texts_of(*lengths)), lengths, MaskSpec(0.3))
    assert shapes == [(2, 30, 30), (1, 9, 9)]


# ---------------------------------------------------------------- LM cross-entropy in chunks

def lm_batch(s=37, d=8, v=29, dtype=torch.float32):
    hidden = torch.randn(s, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).requires_grad_()
    targets = torch.randint(0, v, (s,))
    targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 28, 29, 1024])     # of 29 that are predicted
def test_chunks_equal_cross_entropy(chunk):
    hidden, weight, targets = lm_batch()
    got = next_token_loss(hidden, weight, targets, chunk)
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(3 * got, (hidden, weight)),
                    torch.autograd.grad(3 * want, (hidden, weight))):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_loss_that_nobody_trains_on_forms_no_gradient():
    hidden, weight, targets = lm_batch()
    want = next_token_loss(hidden, weight, targets, 7).detach()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert next_token_loss(hidden, weight, targets, 7) == want
    assert counter.get_total_flops() == 2 * int((targets >= 0).sum()) * weight.numel()


def test_large_logits_do_not_overflow():
    hidden, weight, targets = lm_batch()
    got = next_token_loss(hidden * 1000, weight, targets, 8)
    each = F.cross_entropy(hidden * 1000 @ weight.T, targets, reduction="none", ignore_index=-100)
    assert each.max() > 1000
    cut = each[targets >= 0].clamp(max=-math.log(torch.finfo(torch.float32).tiny))
    assert got.item() == pytest.approx(cut.mean().item(), rel=1e-5)
    want = plain.next_token_loss(hidden * 1000, weight, targets)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want))):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_hidden_states(autocast):
    hidden, weight, targets = lm_batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = next_token_loss(hidden, weight, targets, 10)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [loss.dtype, *(g.dtype for g in grads)] == [torch.float32, torch.bfloat16, torch.float32]
    exact = hidden.detach().float().requires_grad_()
    want = F.cross_entropy(exact @ weight.T, targets)
    assert loss.item() == pytest.approx(want.item(), rel=0.01)
    for a, b in zip(grads, torch.autograd.grad(want, (exact, weight))):
        assert relative(a.float(), b) < 0.02
