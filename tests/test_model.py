"""The decoder: every attention path against softmax written out, and the field's commonest bug.

That bug is a bidirectional model that is silently causal. Here the last token is changed and the
first token's state is looked at, for every mask, padding side, dtype, and a batch of one.
"""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from mask import CAUSAL, FULL, MaskSpec, soft_mask
from model import (Conan, ConanConfig, Packing, RMSNorm, _RMSNorm, _Rope, _SwiGLU, apply_rope,
                   attend, explicit_attention, flatten, pool, rope_cache)

SOFT, COL, HARDLY = MaskSpec(0.3), MaskSpec(0.3, axis="col"), MaskSpec(0.9)
LOGITS, LEAKY = MaskSpec(0.3, apply="logits"), MaskSpec(0.0, apply="logits")
MASKS = {"causal": CAUSAL, "full": FULL, "soft": SOFT, "soft-col": COL, "nearly-full": HARDLY,
         "logits": LOGITS, "logits-0": LEAKY}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
CONFIG = ConanConfig(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=40,
                     block_size=64)


def tiny(std=0.2, **changes):
    """A model with weights large enough for attention to be far from uniform."""
    model = Conan(dataclasses.replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=std, generator=generator)
    return model


def texts_of(*lengths):
    """Random token ids for texts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 61, (n,), generator=generator) for n in lengths]


def embed(model, texts, mask=FULL):
    return model(torch.cat(texts), [len(t) for t in texts], mask)


def states(model, ids, lengths, mask):
    """Return each text's last hidden states, in the order given."""
    packing = Packing(lengths, "cpu")
    hidden = model.hidden(ids[packing.source], packing, mask)
    parts = hidden.split(packing.lengths.tolist())
    return [parts[i] for i in packing.order.argsort().tolist()]


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


# ---------------------------------------------------------------- attention paths

def written_out(q, k, v, lengths, mask):
    """One text and one head at a time, in float64, with the mask that Eq. (4) prints."""
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    share = q.shape[1] // k.shape[1]
    for b, n in enumerate(lengths):
        m = soft_mask(n, mask.alpha, mask.axis)
        for h in range(q.shape[1]):
            key, value = k[b, h // share, :n], v[b, h // share, :n]
            logits = q[b, h, :n] @ key.T / math.sqrt(q.shape[-1])
            e = torch.exp(logits * m) if mask.apply == "logits" else m * torch.exp(logits)
            out[b, h, :n] = e / e.sum(1, keepdim=True) @ value
    return out


def group_of(lengths, mask, dtype):
    packing = Packing(lengths, "cpu")
    assert len(packing.groups) == 1
    packing.set_mask(mask, dtype)
    return packing.groups[0]


@each_mask
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 8, 6], [1], [1, 1], [12]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_path_is_softmax_forward_and_backward(mask, lengths, dtype):
    b, t = len(lengths), max(lengths)
    group = group_of(lengths, mask, dtype)
    real = torch.arange(t)[None] < torch.tensor(lengths)[:, None]           # (B, T)
    direction = torch.randn(b, 4, t, 6, dtype=dtype) * real[:, None, :, None]
    qkv = [torch.randn(b, heads, t, 6, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]

    def run(path):
        out = path(*qkv) * real[:, None, :, None]
        return [out, *torch.autograd.grad((out * direction).sum(), qkv)]

    want = run(lambda q, k, v: written_out(q, k, v, lengths, mask))
    for path in (lambda q, k, v: attend(q, k, v, group, mask),
                 lambda q, k, v: explicit_attention(q, k, v, group.bias, mask.is_causal,
                                                    group.weights)):
        for got, right in zip(run(path), want):
            assert torch.isfinite(got).all()
            # log M and the explicit softmax are float32; gradients of a lone token are all zero
            assert torch.allclose(got.double(), right.double(), atol=3e-6, rtol=3e-6)


@each_mask
def test_bfloat16_on_a_cpu_takes_the_explicit_path_and_agrees(mask):
    lengths = [9, 8, 6]
    group = group_of(lengths, mask, torch.bfloat16)
    q, k, v = (torch.randn(3, heads, 9, 6).bfloat16() for heads in (4, 2, 2))
    got = attend(q, k, v, group, mask)
    want = written_out(q, k, v, lengths, mask)
    assert got.dtype == torch.bfloat16
    for b, n in enumerate(lengths):
        assert torch.allclose(got[b, :, :n].double(), want[b, :, :n], atol=0.03)


@pytest.mark.parametrize("path", ["sdpa", "explicit"])
def test_grouped_queries_are_repeated_keys(path):
    q, k, v = torch.randn(2, 6, 7, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    group = group_of([7, 7], SOFT, torch.float32)
    run = (lambda *x: attend(*x, group, SOFT)) if path == "sdpa" else \
        (lambda *x: explicit_attention(*x, group.bias))
    repeated = run(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1))
    assert torch.allclose(run(q, k, v), repeated, atol=1e-6)
    assert not torch.allclose(run(q, k, v), run(q, k.flip(1), v.flip(1)), atol=1e-2)


# ---------------------------------------------------------------- RoPE, RMSNorm

def test_rope_by_hand():
    # E = 4, base 100: frequencies 1 and 1/10; halves (1, 2) and (3, 4) rotate as (1, 3), (2, 4)
    cos, sin = rope_cache(3, 4, 100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 1, 4)
    got = apply_rope(x, cos[:, None], sin[:, None])
    for t in range(3):
        c, s, d, e = math.cos(t), math.sin(t), math.cos(t / 10), math.sin(t / 10)
        want = [c - 3 * s, 2 * d - 4 * e, 3 * c + s, 4 * d + 2 * e]
        assert got[t, 0].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.equal(got[0], x[0])


def test_rope_scores_depend_on_the_distance_only():
    cos, sin = (c[:, None] for c in rope_cache(40, 8, 10_000.0))
    q, k = (apply_rope(torch.randn(1, 1, 8).expand(40, 1, 8), cos, sin)[:, 0] for _ in "qk")
    scores = q @ k.T                                                        # (40, 40)
    for shift in (-7, 0, 1, 12):
        diagonal = scores.diagonal(shift)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert (scores[0, 0] - scores[0, 1]).abs() > 1e-3
    assert torch.allclose(q.norm(dim=1), q[0].norm().expand(40), atol=1e-5)


def test_hand_written_gradients_are_those_of_the_formulas():
    torch.manual_seed(0)
    x, w = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 8), 8))
    angles = torch.randn(5, 1, 2, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    heads = torch.randn(5, 4, 4, dtype=torch.float64).requires_grad_()      # 3 turn, 1 does not
    assert torch.allclose(_RMSNorm.apply(x, w, 1e-5), F.rms_norm(x, (8,), w, 1e-5), rtol=1e-12)
    assert torch.equal(_SwiGLU.apply(x[0]), F.silu(x[0, :, :4]) * x[0, :, 4:])
    turned = torch.cat([apply_rope(heads[:, :3], cos, sin), heads[:, 3:]], dim=1)
    assert torch.allclose(_Rope.apply(heads, cos, sin, 3), turned, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-5), (x, w))
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x[0].detach().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda a: _Rope.apply(a, cos, sin, 3), (heads,))


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    # mean square of (3, 4) is 12.5
    want = [3 / math.sqrt(12.5), 40 / math.sqrt(12.5)]
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx(want)


# ---------------------------------------------------------------- packing

def test_packing_by_hand():
    packing = Packing([2, 9, 3, 8], "cpu")
    assert packing.order.tolist() == [1, 3, 2, 0]
    assert packing.lengths.tolist() == [9, 8, 3, 2]
    assert packing.text.tolist() == [0] * 9 + [1] * 8 + [2] * 3 + [3] * 2
    assert packing.position.tolist() == [*range(9), *range(8), *range(3), *range(2)]
    # the texts start at 0, 2, 11 and 14 of the list that was given
    assert packing.source.tolist() == [*range(2, 11), *range(14, 22), *range(11, 14), 0, 1]
    assert packing.last.tolist() == [8, 16, 19, 21]
    assert [g.shape for g in packing.groups] == [(2, 9), (2, 3)]
    # laid out as 2 x 9 and 2 x 3 places, the last of each block is a pad
    assert packing.real.tolist() == [True] * 17 + [False] + [True] * 5 + [False]
    assert packing.flat.tolist() == [*range(17), *range(18, 23)]
    assert packing.padded[packing.flat].tolist() == list(range(22))
    assert packing.groups[0].tokens[1].tolist() == [True] * 8 + [False]
    assert not packing.is_dense and Packing([9, 9, 2], "cpu").is_dense


def test_groups_cover_every_text_once_and_waste_little():
    lengths = torch.randint(1, 200, (300,))
    packing = Packing(lengths, "cpu")
    assert torch.equal(torch.cat([g.lengths for g in packing.groups]),
                       lengths.sort(descending=True).values)
    places = sum(b * t for b, t in (g.shape for g in packing.groups))
    assert lengths.sum() <= places == len(packing.padded) < 1.1 * lengths.sum()
    for order in (packing.source, packing.padded[packing.flat]):
        assert torch.equal(order.sort().values, torch.arange(int(lengths.sum())))


def test_no_mask_tensor_where_none_is_needed():
    for mask, lengths, bias in ((CAUSAL, [9, 8], False), (FULL, [9, 9], False),
                                (FULL, [9, 8], True), (SOFT, [9, 9], True)):
        group = group_of(lengths, mask, torch.float32)
        assert (group.bias is not None) == bias and group.weights is None


def test_the_bias_is_built_once_a_batch_and_once_for_equal_lengths(monkeypatch):
    """Not in each of the two layers; and texts of one length share one (T, T)."""
    shapes, real = [], model_file.mask_weights

    def note(*args):
        shapes.append(tuple(real(*args).shape))
        return real(*args)
    monkeypatch.setattr(model_file, "mask_weights", note)
    embed(tiny(), texts_of(9, 9, 9, 30, 29), SOFT)
    assert shapes == [(2, 30, 30), (1, 9, 9)]


# ---------------------------------------------------------------- the last token and the first

def batch_of(case):
    """Return (ids (S,), lengths) of a batch in one of the layouts users have."""
    if case == "one":
        return texts_of(9)[0], [9]
    if case == "flat":
        return torch.cat(texts_of(4, 9, 2, 8)), [4, 9, 2, 8]
    lengths = torch.tensor([9, 9] if case == "all ones" else [4, 9, 8])
    at = torch.arange(9)
    pad = at >= 9 - lengths[:, None] if case == "left" else at < lengths[:, None]
    return flatten(torch.randint(0, 61, pad.shape), pad)


@each_mask
@pytest.mark.parametrize("case", ["one", "flat", "all ones", "right", "left"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_token_sees_the_last_one_unless_causal(mask, case, dtype, checkpointing):
    model = tiny()
    model.checkpointing = checkpointing
    ids, lengths = batch_of(case)
    ends = torch.as_tensor(lengths).cumsum(0).tolist()

    def first_states(ids):
        autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        with autocast:
            return [s[0] for s in states(model, ids, lengths, mask)]

    before = first_states(ids)
    for text, end in enumerate(ends):
        changed = ids.clone()
        changed[end - 1] = (ids[end - 1] + 1) % 61
        after = first_states(changed)
        for other in range(len(ends)):
            same = torch.equal(before[other], after[other])
            assert same == (other != text or mask.is_causal), (text, other)
        if not mask.is_causal:
            assert relative(after[text], before[text]) > 1e-3


@pytest.mark.parametrize("mask, first_moves", [(CAUSAL, False), (SOFT, True), (FULL, True)])
def test_the_same_through_forward_and_for_gradients(mask, first_moves):
    """d (first token's state) / d (last token's embedding) is zero for the causal mask only."""
    model = tiny()
    ids = torch.arange(8)                                   # all different
    states(model, ids, [8], mask)[0][0].sum().backward()
    seen = model.embed_tokens.weight.grad.abs().sum(1) > 0                  # (V,)
    assert seen.tolist() == [True] + [first_moves] * 7 + [False] * 53
    moved = embed(model, [torch.tensor([1, 2, 3])], mask) - embed(
        model, [torch.tensor([1, 2, 4])], mask)
    assert moved.abs().max() > 1e-3                         # the mean over tokens always moves


# ---------------------------------------------------------------- batch mates and padding

@each_mask
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_does_not_know_its_batch_mates(mask, pooling):
    model = tiny(pooling=pooling)
    texts = texts_of(3, 17, 1, 16, 9, 15, 17)
    alone = torch.cat([embed(model, [t], mask) for t in texts])
    assert relative(embed(model, texts, mask), alone) < 1e-5                # order restored, too
    assert relative(embed(model, texts[::-1], mask).flip(0), alone) < 1e-5
    assert relative(embed(model, texts[3:5], mask), alone[3:5]) < 1e-5
    assert torch.cdist(alone, alone).add(torch.eye(7) * 9).min() > 0.1      # and tells them apart


@each_mask
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_embedding_does_not_know_its_padding(mask, side):
    model = tiny()
    texts = texts_of(3, 12, 11)
    ids, pad = torch.randint(0, 61, (3, 20)), torch.zeros(3, 20, dtype=torch.bool)
    for b, text in enumerate(texts):
        place = slice(20 - len(text), 20) if side == "left" else slice(0, len(text))
        ids[b, place], pad[b, place] = text, True
    flat, lengths = flatten(ids, pad)
    assert torch.equal(model(flat, lengths, mask), embed(model, texts, mask))


def test_masks_differ_and_alpha_moves_smoothly_between_the_ends():
    model = tiny()
    text = texts_of(12)
    ends = [embed(model, text, mask) for mask in (CAUSAL, FULL)]
    distance = relative(*ends)
    assert distance > 0.01
    assert relative(embed(model, text, MaskSpec(1e-9)), ends[0]) < 1e-4
    assert relative(embed(model, text, MaskSpec(1 - 1e-9)), ends[1]) < 1e-4
    assert relative(embed(model, text, SOFT), embed(model, text, COL)) > 1e-3
    assert relative(embed(model, text, SOFT), embed(model, text, LOGITS)) > 1e-3


def test_pooling_by_hand():
    packing = Packing([1, 3], "cpu")                        # sorted: the text of 3 comes first
    hidden = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0], [5.0, 5.0]])
    assert pool(hidden, packing, "mean").tolist() == [[3, 1], [5, 5]]
    assert pool(hidden, packing, "last").tolist() == [[6, 3], [5, 5]]
    assert pool(hidden.bfloat16(), packing).dtype == torch.float32


def test_flatten_by_hand():
    ids = torch.tensor([[9, 1, 2], [3, 9, 9]])
    flat, lengths = flatten(ids, torch.tensor([[False, True, True], [True, False, False]]))
    assert flat.tolist() == [1, 2, 3] and lengths.tolist() == [2, 1]


# ---------------------------------------------------------------- training

@each_mask
def test_checkpointing_recomputes_and_changes_nothing(mask):
    texts = texts_of(3, 12, 11)
    grads, calls = [], []
    for checkpointing in (False, True):
        model = tiny()
        model.checkpointing = checkpointing
        count = []
        model.layers[0].register_forward_pre_hook(lambda *_: count.append(1))
        embed(model, texts, mask).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(g.abs().sum() > 0 for g in grads[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype, close", [("float32", 1e-6), ("bfloat16", 0.02)])
def test_lm_loss_is_cross_entropy_of_explicit_logits(dtype, close):
    model = tiny()
    texts = texts_of(5, 11, 4, 10)
    ids, lengths = torch.cat(texts), [len(t) for t in texts]
    targets = torch.cat([torch.cat([t[1:], torch.tensor([-100])]) for t in texts])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        got = model(ids, lengths, CAUSAL, targets)
    got_grads = torch.autograd.grad(got, list(model.parameters()))
    losses = []
    for text in texts:
        hidden = states(model, text, [len(text)], CAUSAL)[0]                # (T, D)
        logits = hidden[:-1] @ model.embed_tokens.weight.T
        losses.append(F.cross_entropy(logits, text[1:], reduction="none"))
    want = torch.cat(losses).mean()
    assert got.dtype == torch.float32 and got.dim() == 0
    assert got.item() == pytest.approx(want.item(), rel=close)
    for a, b in zip(got_grads, torch.autograd.grad(want, list(model.parameters()))):
        assert relative(a, b) < 10 * close


def test_a_batch_with_nothing_to_predict():
    """A rank whose share of an SFT batch was cut to prompts must still join the others."""
    model = tiny()
    loss = model(torch.arange(9), [4, 5], CAUSAL, torch.full((9,), -100))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_model_of_another_dtype_runs():
    texts = texts_of(5, 11)
    want = embed(tiny(), texts)
    for dtype, close in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        got = embed(tiny().to(dtype), texts)
        assert got.dtype == torch.float32 and relative(got, want) < close


def test_autocast_is_near_float32():
    texts = texts_of(5, 11)
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(tiny(), texts, SOFT)
    assert got.dtype == torch.float32 and 0 < relative(got, embed(tiny(), texts, SOFT)) < 0.05


def test_training_goes_on_after_inference_mode():
    model, texts = tiny(), texts_of(5, 11)
    with torch.inference_mode():                            # fills the table of angles
        before = embed(model, texts)
    after = embed(model, texts)
    after.sum().backward()
    assert torch.equal(before, after) and model.embed_tokens.weight.grad is not None


# ---------------------------------------------------------------- shape and weights

def test_the_papers_model_has_1499_million_parameters():
    with torch.device("meta"):
        model = Conan(ConanConfig())
    d, e, f, v, layers = 3584, 112, 8192, 150_000, 8
    by_hand = v * d + d + layers * (2 * d * d + 2 * d * 8 * e + 3 * d * f + 2 * d)
    assert model.count_params() == by_hand == 1_499_205_120


def test_layout_is_llamas_and_nothing_is_hidden_in_buffers():
    block = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
             "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj"]
    want = {f"layers.{i}.{name}.weight" for i in range(2) for name in block}
    assert set(tiny().state_dict()) == want | {"embed_tokens.weight", "norm.weight"}
    assert not list(tiny().buffers())


def test_initial_weights():
    model = Conan(dataclasses.replace(CONFIG, n_layer=8, vocab_size=999)).init_weights()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02  # sqrt(2 * 8) = 4
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(p.mean().item()) < 0.1 * std, name


def test_initial_weights_follow_the_generator():
    one, same, other = (Conan(CONFIG).init_weights(torch.Generator().manual_seed(s))
                        for s in (5, 5, 6))
    assert torch.equal(one.embed_tokens.weight, same.embed_tokens.weight)
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)


def test_attention_may_be_narrower_than_the_model():
    config = dataclasses.replace(CONFIG, attention_dim=16)
    model = Conan(config).init_weights()
    assert config.head_dim == 4 and model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert model(torch.arange(9), [4, 5]).shape == (2, 32)
    with pytest.raises(ValueError, match="attention_dim 10"):
        dataclasses.replace(CONFIG, attention_dim=10)


def test_rare_tokens_may_start_longer():
    """embed_rank_power: row i has the length (log(i + 2) / log(V + 1)) ** power of the last row."""
    config = dataclasses.replace(CONFIG, vocab_size=20_000, n_embd=64, embed_rank_power=3.0,
                                 embed_std=0.5)
    lengths = Conan(config).init_weights().embed_tokens.weight.norm(dim=1) / 64 ** 0.5
    for first, end in ((0, 20), (500, 700), (15_000, 20_000)):
        wanted = (math.log((first + end) / 2 + 2) / math.log(20_001)) ** 3 * 0.5
        assert lengths[first:end].mean().item() == pytest.approx(wanted, rel=0.15)
    assert (Conan(CONFIG).rank_scale() == 1).all()


@pytest.mark.parametrize("eps, remembers", [(25.0, True), (1e-5, False)])
def test_a_large_norm_eps_lets_lengths_outlive_the_norms(eps, remembers):
    """Untrained, two texts that share one rare word of eight are nearer than two that share seven
    frequent ones: a bag of words weighted by IDF. The usual eps makes all words equal."""
    torch.manual_seed(3)
    model = Conan(dataclasses.replace(CONFIG, vocab_size=20_000, n_embd=256, norm_eps=eps,
                                      embed_std=0.2, embed_rank_power=4.0)).init_weights()
    frequent, rare = list(range(260, 274)), 19_000
    one = torch.tensor([*frequent[:7], rare])
    shares_rare = torch.tensor([*frequent[7:], rare])
    shares_frequent = torch.tensor([*frequent[:7], rare + 500])
    a, b, c = model(torch.cat([one, shares_rare, shares_frequent]), [8, 8, 8])
    assert (a @ b > a @ c).item() == remembers


def test_a_new_model_knows_nothing():
    """The loss of random weights is that of a uniform guess."""
    model = Conan(CONFIG).init_weights()
    text = texts_of(40)[0]
    loss = model(text, [40], CAUSAL, torch.cat([text[1:], torch.tensor([-100])]))
    assert loss.item() == pytest.approx(math.log(61), rel=0.02)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("lengths, text", [
    ([], "non-empty"), ([3, 0, 6], "positive"), ([-1, 10], "positive"), ([[9]], "lengths"),
    ([4, 4], "sum to 8 but there are 9"), ([5, 5], "sum to 10 but there are 9"),
])
def test_lengths_that_do_not_fit(lengths, text):
    with pytest.raises(ValueError, match=text):
        tiny()(torch.arange(9), lengths)


def test_a_text_longer_than_the_context():
    assert tiny()(torch.zeros(64, dtype=torch.int64), [64]).shape == (1, 32)
    with pytest.raises(ValueError, match="65 tokens exceeds block_size 64"):
        tiny()(torch.zeros(65, dtype=torch.int64), [65])


@pytest.mark.parametrize("change, text", [
    ({"n_layer": 0}, "n_layer"), ({"vocab_size": -1}, "-1"), ({"block_size": 0}, "block_size"),
    ({"n_embd": 30}, "30"), ({"n_embd": 12}, "even"), ({"n_kv_head": 3}, "n_kv_head 3"),
    ({"pooling": "first"}, "first"),
])
def test_shapes_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(CONFIG, **change)


def test_padding_that_is_not_a_bool_of_the_same_shape():
    for pad in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="pad"):
            flatten(torch.zeros(2, 3, dtype=torch.int64), pad)
    nothing = flatten(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="positive"):
        tiny()(*nothing)


# ---------------------------------------------------------------- a trusted implementation

@pytest.mark.extras
@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
def test_hidden_states_are_those_of_transformers_llama(mask):
    transformers = pytest.importorskip("transformers", minversion="5.2")
    c = CONFIG
    llama = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default",
                                                  "rope_theta": c.rope_base},
        is_causal=mask.is_causal)).eval()
    model = tiny()
    llama.load_state_dict(model.state_dict())
    texts = texts_of(5, 12, 11)
    pad = torch.arange(12) < torch.tensor([[5], [12], [11]])                # (B, T)
    ids = torch.zeros(3, 12, dtype=torch.int64)
    ids[pad] = torch.cat(texts)
    with torch.no_grad():
        want = llama(input_ids=ids, attention_mask=pad.long()).last_hidden_state[pad]
        got = torch.cat(states(model, torch.cat(texts), [5, 12, 11], mask))
    assert relative(got, want) < 1e-5

