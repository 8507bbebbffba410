"""The decoder: operations by hand, against torch, and the field's commonest bug.

That bug is a bidirectional model that is silently causal. Here the last token changes, and the
first token's state must change with it: for every mask, batch layout, dtype, by plain and by fast
operations.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import model as plain
from engine import kernels
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig, pool, rope_angles
from tiny import CONFIG, MASKS, relative, texts_of, tiny

OPS = {"plain": None, "fast": kernels.pick("cpu")}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
each_ops = pytest.mark.parametrize("ops", OPS.values(), ids=OPS)


def embed(model, texts, mask=FULL, **more):
    return model(torch.cat(texts), [len(t) for t in texts], mask, **more)


# ---------------------------------------------------------------- the operations

@pytest.mark.parametrize("mask, weight", [
    (CAUSAL, 0), (FULL, 3),
    (MaskSpec(0.25), 3 / 2),                       # M_12 = 0.25 * 2 / 1: 3 counts half
    (MaskSpec(0.25, "col"), 3 / 4),                # M_12 = 0.25 * 2 / 2
    (MaskSpec(0.25, apply="logits"), math.sqrt(3)),
    (MaskSpec(0.0, apply="logits"), 1),            # a closed logit is 0, and e^0 = 1: not causal
], ids=str)
def test_attention_of_two_tokens_by_hand(mask, weight):
    """E = 1: logits are 0 to token 1 and log 3 to token 2, so e^logits are 1 and 3; values 0, 1."""
    q, k, v = torch.ones(2, 1, 1), torch.tensor([0, math.log(3)]), torch.tensor([0.0, 1.0])
    got = plain.attention(q, k.view(2, 1, 1), v.view(2, 1, 1), ([2], mask)).flatten()
    assert got.tolist() == pytest.approx([weight / (1 + weight), 3 / 4])


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
def test_attention_is_torchs_with_grouped_heads(mask):
    lengths = [5, 1, 8]
    q, k, v = (torch.randn(14, heads, 6) for heads in (4, 2, 2))
    got = plain.attention(q, k, v, plain.prepare(lengths, mask, q))
    for i, part in enumerate(got.split(lengths)):
        own = (x.split(lengths)[i].transpose(0, 1)[None] for x in (q, k, v))
        want = F.scaled_dot_product_attention(*own, is_causal=mask.is_causal, enable_gqa=True)
        assert torch.allclose(part.transpose(0, 1), want[0], atol=1e-6)


def test_rope_by_hand():
    # E = 4, base 100: frequencies 1 and 1/10; halves (1, 2) and (3, 4) rotate as (1, 3), (2, 4)
    cos, sin = rope_angles(3, 4, 100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 1, 4)
    got = plain.rope(x, cos[:, None], sin[:, None])
    for t in range(3):
        c, s, d, e = math.cos(t), math.sin(t), math.cos(t / 10), math.sin(t / 10)
        want = [c - 3 * s, 2 * d - 4 * e, 3 * c + s, 4 * d + 2 * e]
        assert got[t, 0].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.equal(got[0], x[0])


def test_rope_scores_depend_on_the_distance_only():
    cos, sin = (table[:, None] for table in rope_angles(40, 8, 10_000.0))
    q, k = (plain.rope(torch.randn(1, 1, 8).expand(40, 1, 8), cos, sin)[:, 0] for _ in "qk")
    scores = q @ k.T                                                        # (40, 40)
    for shift in (-7, 0, 1, 12):
        diagonal = scores.diagonal(shift)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert (scores[0, 0] - scores[0, 1]).abs() > 1e-3
    assert torch.allclose(q.norm(dim=1), q[0].norm().expand(40), atol=1e-5)


def test_rms_norm_and_swiglu_by_hand():
    # the mean square of (3, 4) is 12.5
    got = plain.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0]), 0.0)
    assert got.tolist() == pytest.approx([3 / math.sqrt(12.5), 40 / math.sqrt(12.5)])
    got = plain.rms_norm(torch.tensor([0.3, -0.3]), torch.ones(2), 0.07)    # 0.09 + 0.07 = 0.4^2
    assert got.tolist() == pytest.approx([0.75, -0.75])
    x, one = torch.randn(64).bfloat16(), torch.ones(64)            # the mean is in float32
    assert torch.equal(plain.rms_norm(x, one, 0.0), plain.rms_norm(x.float(), one, 0.0).bfloat16())
    got = plain.swiglu(torch.tensor([0.0, math.log(3)]), torch.tensor([5.0, 4.0]))
    assert got.tolist() == pytest.approx([0, 3 * math.log(3)])     # sigmoid(log 3) = 3 / 4


@pytest.mark.parametrize("loss_of", [plain.next_token_loss, kernels.next_token_loss])
def test_next_token_loss_by_hand(loss_of):
    hidden, weight = torch.tensor([[1.0], [5.0]]), torch.tensor([[0.0], [math.log(3)]])
    loss = loss_of(hidden, weight, torch.tensor([1, -100]))        # its probability is 3 / 4
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert loss_of(hidden, weight, torch.tensor([-100, -100])) == 0
    half = loss_of(hidden.bfloat16(), weight.bfloat16(), torch.tensor([1, 0]))
    assert half.dtype == torch.float32


def test_pooling_by_hand():
    hidden = torch.tensor([[5.0, 5.0], [1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    assert pool(hidden, [1, 3]).tolist() == [[5, 5], [3, 1]]
    assert pool(hidden, [1, 3], skip=[0, 1]).tolist() == [[5, 5], [4, 1.5]]
    assert pool(hidden, [1, 3], skip=[1, 9]).tolist() == [[5, 5], [6, 3]]  # the last one remains
    assert pool(hidden.bfloat16(), [1, 3]).dtype == torch.float32


# ---------------------------------------------------------------- the last token and the first

@each_mask
@each_ops
@pytest.mark.parametrize("lengths", [[9], [4, 9, 2, 8], [9, 9]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_the_first_token_sees_the_last_one_unless_causal(mask, ops, lengths, dtype, checkpointing):
    model = tiny(ops)
    model.checkpointing = checkpointing
    ids = torch.cat(texts_of(*lengths))
    ends = torch.tensor(lengths).cumsum(0).tolist()

    def first_states(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return [s[0] for s in model.hidden(ids, lengths, mask).split(lengths)]

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


# ---------------------------------------------------------------- embeddings

@each_mask
@each_ops
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_does_not_depend_on_its_batch_mates(mask, ops, pooling):
    model = tiny(ops, pooling=pooling)
    texts = texts_of(3, 17, 1, 16, 9, 15, 17)
    alone = torch.cat([embed(model, [t], mask) for t in texts])
    assert relative(embed(model, texts, mask), alone) < 1e-5
    assert relative(embed(model, texts[::-1], mask).flip(0), alone) < 1e-5
    assert relative(embed(model, texts[3:5], mask), alone[3:5]) < 1e-5
    assert torch.cdist(alone, alone).add(torch.eye(7) * 9).min() > 0.1      # and tells them apart


@each_ops
def test_skipped_tokens_are_read_and_not_pooled(ops):
    """The instruction is part of what attention sees, and no part of the mean."""
    model, texts = tiny(ops), texts_of(9, 5, 3)
    states = model.hidden(torch.cat(texts), [9, 5, 3], FULL).split([9, 5, 3])
    want = torch.stack([states[0][4:].mean(0), states[1].mean(0), states[2][-1]])
    got = embed(model, texts, skip=[4, 0, 7])
    assert torch.allclose(got, want, atol=1e-6)
    assert relative(got[0], embed(model, [texts[0][4:]])[0]) > 0.01
    for changes, want in (({"pool_prompt": True}, [s.mean(0) for s in states]),
                          ({"pooling": "last"}, [s[-1] for s in states])):
        got = embed(tiny(ops, **changes), texts, skip=[4, 0, 7])
        assert torch.allclose(got, torch.stack(want), atol=1e-6), changes


# ---------------------------------------------------------------- training

@each_mask
def test_checkpointing_recomputes_and_changes_nothing(mask):
    texts = texts_of(3, 12, 11)
    grads, calls = [], []
    for checkpointing in (0, 1, 26, 27):                   # the texts have 26 tokens
        model, count = tiny(), []
        model.checkpointing = checkpointing
        model.layers[0].register_forward_pre_hook(lambda *_: count.append(1))
        embed(model, texts, mask).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2, 2, 1]
    assert all(g.abs().sum() > 0 for g in grads[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6)
               for other in grads[1:] for a, b in zip(grads[0], other))


@each_ops
def test_lm_loss_is_the_mean_over_what_is_predicted(ops):
    model, texts = tiny(ops), texts_of(5, 11, 4)
    targets = torch.cat([torch.cat([t[1:], torch.tensor([-100])]) for t in texts])
    losses = []
    for text in texts:
        hidden = model.hidden(text, [len(text)], CAUSAL)                    # (T, D)
        logits = hidden[:-1] @ model.embed_tokens.weight.T
        losses += [F.cross_entropy(row, t) for row, t in zip(logits, text[1:])]
    got = embed(model, texts, CAUSAL, targets=targets)
    assert got.item() == pytest.approx(sum(losses).item() / 17, rel=1e-6)


@each_ops
def test_a_batch_with_nothing_to_predict(ops):
    """A rank whose share of an SFT batch was cut to prompts must still join the others."""
    model = tiny(ops)
    loss = model(torch.arange(9), [4, 5], CAUSAL, torch.full((9,), -100))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@each_ops
def test_other_dtypes_are_near_float32(ops):
    texts, mask = texts_of(5, 11), MASKS["soft-row"]
    want = embed(tiny(ops), texts, mask)
    for dtype, close in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        got = embed(tiny(ops).to(dtype), texts, mask)
        assert got.dtype == torch.float32 and relative(got, want) < close
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(tiny(ops), texts, mask)
    assert got.dtype == torch.float32 and 0 < relative(got, want) < 0.05


def test_training_works_after_inference_mode():
    model, texts = tiny(rope_base=777.0), texts_of(5, 11)
    with torch.inference_mode():                            # the first to form the angles
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


def test_tensor_names_are_llamas_and_there_are_no_buffers():
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


def test_initial_weights_follow_the_generator_alone():
    one, other = (Conan(CONFIG).init_weights(torch.Generator().manual_seed(s)) for s in (5, 6))
    with torch.device("meta"):
        empty = Conan(CONFIG)                               # as a sharded model is built
    fresh = dict(empty.fresh_weights(torch.Generator().manual_seed(5)))
    assert list(fresh) == [name for name, _ in one.named_parameters()]
    assert all(torch.equal(fresh[name], p) for name, p in one.named_parameters())
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("lengths, text", [
    ([], r"not \[\]"), ([3, 0, 6], r"positive token counts .*, not \[3, 0, 6\]"),
    ([4, 4], r"that sum to the 9 ids, not \[4, 4\]"),
])
def test_lengths_that_do_not_fit(lengths, text):
    ids = torch.arange(9 if lengths else 0)
    with pytest.raises(ValueError, match=text):
        tiny()(ids, lengths)


def test_a_text_longer_than_the_context():
    model = tiny(block_size=64)
    assert model(torch.zeros(64, dtype=torch.int64), [64]).shape == (1, 32)
    with pytest.raises(ValueError, match="65 tokens exceeds block_size 64"):
        model(torch.zeros(65, dtype=torch.int64), [65])


@pytest.mark.parametrize("change, text", [
    ({"n_layer": 0}, "n_layer must be at least 1, not 0"), ({"n_embd": 30}, "n_embd 30"),
    ({"n_embd": 12}, "even"), ({"n_kv_head": 3}, "n_kv_head 3"), ({"pooling": "first"}, "first"),
])
def test_shapes_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(CONFIG, **change)


# ---------------------------------------------------------------- a trusted implementation

@pytest.mark.extras
@each_ops
@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
def test_hidden_states_are_those_of_transformers_llama(mask, ops):
    transformers = pytest.importorskip("transformers", minversion="5.2")
    c = CONFIG
    llama = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default",
                                                  "rope_theta": c.rope_base},
        is_causal=mask.is_causal)).eval()
    model = tiny(ops)
    llama.load_state_dict(model.state_dict())
    texts = texts_of(5, 12, 11)
    is_token = torch.arange(12) < torch.tensor([[5], [12], [11]])           # (B, T)
    ids = torch.zeros(3, 12, dtype=torch.int64)
    ids[is_token] = torch.cat(texts)
    with torch.no_grad():
        want = llama(input_ids=ids, attention_mask=is_token.long()).last_hidden_state[is_token]
        got = model.hidden(torch.cat(texts), [5, 12, 11], mask)
    assert relative(got, want) < 1e-5
