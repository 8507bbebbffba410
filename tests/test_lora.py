"""Adapters: by hand, and against autograd on the plain model with merged weights."""
import pytest
import torch

from engine import kernels
from lora import add_lora, merged_state_dict
from mask import CAUSAL, FULL
from model import Conan
from tiny import CONFIG, MASKS, relative

LENGTHS = [9, 30, 1, 28]
IDS = torch.arange(sum(LENGTHS)) * 7 % 61
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def base():
    return Conan(CONFIG, kernels.pick("cpu")).init_weights(torch.Generator().manual_seed(1))


def moved(rank=4, alpha=None):
    """Return a model with adapters that have left zero, as training moves them."""
    model = add_lora(base(), rank, alpha, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def merged(model):
    """Return a plain model with the same outputs."""
    plain = base()
    plain.load_state_dict(merged_state_dict(model))
    return plain


def gradients(model, mask=FULL):
    model.zero_grad()
    (model(IDS, LENGTHS, mask) * torch.arange(1, 33)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_two_by_two_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    add_lora(model, rank=1, alpha=2)
    model[0].lora_a.data = torch.tensor([[1.0, 2.0]])
    model[0].lora_b.data = torch.tensor([[3.0], [4.0]])
    # W + 2 / 1 * [3, 4]^T [1, 2] = [[1 + 6, 12], [8, 1 + 16]]
    assert model[0].weight.tolist() == [[7, 12], [8, 17]]
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-5, -9]
    assert merged_state_dict(model)["0.weight"].tolist() == [[7, 12], [8, 17]]
    assert model.state_dict()["0.weight"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_mask
def test_step_0_is_the_base_and_merging_changes_no_bit(mask, dtype):
    model = moved()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.no_grad():
        plain = base()(IDS, LENGTHS, mask)
        assert torch.equal(add_lora(base(), 4)(IDS, LENGTHS, mask), plain)
        out = model(IDS, LENGTHS, mask)
        assert relative(out, plain) > 0.01
        assert torch.equal(merged(model)(IDS, LENGTHS, mask), out)


def test_all_projections_have_adapters_and_nothing_else_trains():
    model = add_lora(base(), 4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = {name.split(".")[3] for name in trained}
    assert names == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(trained) == 14 * CONFIG.n_layer and all(".lora_" in name for name in trained)
    grads = gradients(moved())
    assert {name for name, grad in grads.items() if grad is not None} == set(trained)
    assert all(float(grads[name].norm()) > 0 for name in trained)
    model(IDS, LENGTHS, CAUSAL, targets=IDS.roll(-1)).backward()    # stages 1 and 2 could, too
    assert model.embed_tokens.weight.grad is None
    # B is zero at the start, so A's gradient is
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} \
        == {name for name in trained if name.endswith("lora_b")}


@pytest.mark.parametrize("checkpointing", [False, True])
@each_mask
def test_gradients_follow_from_those_of_the_merged_weights(mask, checkpointing):
    """d loss / dB = scale * G A^T and d loss / dA = scale * B^T G, with G of the plain model."""
    model = moved(rank=3, alpha=7.5)
    plain = gradients(merged(model), mask)
    model.checkpointing = checkpointing
    grads, values = gradients(model, mask), dict(model.named_parameters())
    for name in [n.removesuffix("lora_a") for n in values if n.endswith("lora_a")]:
        g, a, b = plain[f"{name}weight"], values[f"{name}lora_a"], values[f"{name}lora_b"]
        assert relative(grads[f"{name}lora_a"], 2.5 * b.T @ g) < 1e-5, name
        assert relative(grads[f"{name}lora_b"], 2.5 * g @ a.T) < 1e-5, name


def test_an_update_has_the_adapters_rank_and_the_base_stays():
    model, before = add_lora(base(), 3), base().state_dict()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        gradients(model)
        optimizer.step()
    after = merged_state_dict(model)
    assert list(after) == list(before)                      # the plain names, in their order
    state = model.state_dict()
    for name, value in before.items():
        update = (after[name] - value).double()
        if name.endswith("_proj.weight"):
            assert torch.linalg.matrix_rank(update, rtol=1e-4) == 3, name
        else:
            assert not update.any(), name
        assert torch.equal(state[name], value), name


@pytest.mark.extras
def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.GELU(),
                                 torch.nn.Linear(5, 4, bias=False))
    x, state = torch.randn(7, 6), {k: v.clone() for k, v in layers.state_dict().items()}
    ours = add_lora(layers, 3, alpha=5)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.GELU(),
                                torch.nn.Linear(5, 4, bias=False))
    plain.load_state_dict(state)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False))
    for i in (0, 2):
        layer = theirs.base_model.model[i]
        ours[i].lora_a.data = layer.lora_A["default"].weight.data
        ours[i].lora_b.data = layer.lora_B["default"].weight.data
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    want = theirs.merge_and_unload().state_dict()
    assert all(torch.allclose(value, want[name], atol=1e-6)
               for name, value in merged_state_dict(ours).items())


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(moved(), 4)
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        add_lora(base(), 0)
