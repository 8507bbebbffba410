"""Adapters: by hand, against autograd on merged weights, and through train.py."""
import json
from pathlib import Path

import pytest
import torch

import train
from embed import Embedder
from engine import budget, checkpoint, distributed, kernels
from eval import evaluate
from lora import add_lora, merged_state_dict
from mask import CAUSAL, FULL
from model import Conan
from ranks import (assert_equal, assert_same_run, chain_arguments, die_at, log, meta_of, on_ranks,
                   run, state_of)
from tiny import CONFIG, MASKS, relative

LENGTHS = [9, 30, 1, 28]
IDS = torch.arange(sum(LENGTHS)) * 7 % 61
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def base():
    return Conan(CONFIG, kernels.pick("cpu")).init_weights(torch.Generator().manual_seed(1))


def moved(rank=4):
    """Return a model with adapters that have left zero, as training moves them."""
    model = add_lora(base(), rank, torch.Generator().manual_seed(2))
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
    add_lora(model, rank=1)
    model[0].lora_a.data = torch.tensor([[1.0, 2.0]])
    model[0].lora_b.data = torch.tensor([[3.0], [4.0]])
    # W + 2 / 1 * [3, 4]^T [1, 2] = [[1 + 6, 12], [8, 1 + 16]]
    assert model[0].weight.tolist() == [[7, 12], [8, 17]]
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-5, -9]
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0].weight.dtype == torch.float32
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
    groups = train.build_optimizer(model, train.TrainConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [len(trained), 0]
    q = model.layers[0].self_attn.q_proj                    # A from N(0, 1 / in)
    assert q.lora_a.std().item() == pytest.approx(32 ** -0.5, rel=0.2)
    grads = gradients(moved())
    assert {name for name, grad in grads.items() if grad is not None} == set(trained)
    assert all(float(grads[name].norm()) > 0 for name in trained)
    model(IDS, LENGTHS, CAUSAL, targets=IDS.roll(-1)).backward()    # stages 1 and 2 could, too
    assert model.embed_tokens.weight.grad is None
    # B is zero at the start, so A's gradient is
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} \
        == {name for name in trained if name.endswith("lora_b")}


@pytest.mark.parametrize("checkpointing", [0, 1])
@each_mask
def test_gradients_follow_from_those_of_the_merged_weights(mask, checkpointing):
    """d loss / dB = scale * G A^T and d loss / dA = scale * B^T G, with G of the plain model."""
    model = moved(rank=3)
    plain = gradients(merged(model), mask)
    model.checkpointing = checkpointing
    grads, values = gradients(model, mask), dict(model.named_parameters())
    for name in [n.removesuffix("lora_a") for n in values if n.endswith("lora_a")]:
        g, a, b = plain[f"{name}weight"], values[f"{name}lora_a"], values[f"{name}lora_b"]
        assert relative(grads[f"{name}lora_a"], 2 * b.T @ g) < 1e-5, name
        assert relative(grads[f"{name}lora_b"], 2 * g @ a.T) < 1e-5, name


@pytest.mark.extras
def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.GELU(),
                                 torch.nn.Linear(5, 4, bias=False))
    x, state = torch.randn(7, 6), {k: v.clone() for k, v in layers.state_dict().items()}
    ours = add_lora(layers, 3)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.GELU(),
                                torch.nn.Linear(5, 4, bias=False))
    plain.load_state_dict(state)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False))
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


def test_adapters_are_drawn_from_the_generator():
    one, same, other = (add_lora(base(), 4, torch.Generator().manual_seed(seed)).state_dict()
                        for seed in (1, 1, 2))
    name = next(name for name in one if name.endswith("lora_a"))
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


# ---------------------------------------------------------------- through train.py


def command(rows, out, *more):
    """Return the command line of stages 1 and 2 with all weights, 3 and 4 with adapters."""
    return chain_arguments(rows, "embed_sup", out, "--lora_rank=4", "--learning_rate=0.01",
                           "--save_every=2", *more)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """One undisturbed run of all four stages."""
    out = tmp_path_factory.mktemp("whole")
    train.main(command(rows, out))
    return out


def last_stage(world, rows, whole, out, *more):
    """Train stage 4 once more in `out`, from the stage 3 of the run `whole`."""
    run(world, command(rows, out, *more), checkpoint.latest(whole / "embed_weak"))


def assert_close_run(out, whole):
    """Stage 4 of a run has the losses, gradients and weights of another, but for rounding."""
    lines = log(whole, "embed_sup")
    assert sorted(log(out, "embed_sup")) == sorted(lines)
    for step, line in log(out, "embed_sup").items():
        for key in ("task", "loss", "grad_norm"):
            want = lines[step][key]
            assert line[key] == (want if key == "task" else pytest.approx(want, rel=1e-4))
    assert_equal(state_of(out, "embed_sup"), state_of(whole, "embed_sup"), close=(1e-3, 2e-5))


def test_stages_3_and_4_train_adapters_and_the_ones_before_all_weights(whole):
    ranks = [meta_of(whole, stage)["train"]["lora_rank"] for stage in train.STAGES]
    assert ranks == [0, 0, 4, 4]
    start, directions = state_of(whole, "sft"), {}
    assert "unmerged" not in state_of(whole, "sft", "trainer.pt")
    for stage in ("embed_weak", "embed_sup"):
        end, trainer = state_of(whole, stage), state_of(whole, stage, "trainer.pt")
        assert list(end) == list(start)                        # plain weights
        for name, value in start.items():
            update = (end[name] - value).double()
            assert torch.equal(trainer["unmerged"][name], value), name         # the base stays
            if name.endswith("_proj.weight"):
                assert update.any() and torch.linalg.matrix_rank(update, rtol=1e-4) <= 4, name
            else:
                assert not update.any(), name
            if name.endswith("k_proj.weight"):                 # rank 4 each
                directions.setdefault(name, []).append(update)
        moments = trainer["optimizer"]["state"].values()
        assert len(moments) == 28 and {min(m["exp_avg"].shape) for m in moments} == {4}
        start = end
    for name, updates in directions.items():       # no stage's A is that of another
        assert torch.linalg.matrix_rank(sum(updates), rtol=0.01) > 4, name


def test_the_embedder_scores_as_the_run_with_its_adapters_did(rows, whole):
    embedder = Embedder(whole / "embed_sup", device="cpu")
    scores = json.loads((whole / "embed_sup" / "eval.json").read_text())
    mine = evaluate(embedder, "retrieval", rows / "little" / "test")
    assert mine and mine == {name: scores[name] for name in mine}


def test_a_run_killed_and_resumed_equals_the_undisturbed_one(rows, whole, tmp_path):
    die_at(3, lambda: last_stage(distributed.start("cpu"), rows, whole, tmp_path))
    middle = Embedder(tmp_path / "embed_sup", device="cpu")
    assert middle.meta["step"] == 2 and max(log(tmp_path, "embed_sup")) == 3
    with pytest.raises(SystemExit, match="lora_rank=4 there, 5 now"):
        train.main(command(rows, whole, "--lora_rank=5"))
    torch.manual_seed(12345)
    last_stage(distributed.start("cpu"), rows, whole, tmp_path)
    assert_same_run(tmp_path, whole, "embed_sup")


def in_both_modes(world, rows, whole, out):
    for mode in ("ddp", "zero1"):
        last_stage(world, rows, whole, out / mode, f"--parallel={mode}")


def test_two_processes_train_as_one_does(rows, whole, tmp_path):
    on_ranks(2, in_both_modes, rows, whole, tmp_path)
    for mode in ("ddp", "zero1"):
        assert_close_run(tmp_path / mode, whole)


def test_a_dry_run_counts_what_trains(capsys):
    config = Path(train.__file__).parent / "config/full/embed_weak.py"
    train.main([str(config), "--dry_run", "--lora_rank=64"])
    shown = capsys.readouterr().out
    # in + out of q and o, k and v, gate and up and down
    adapters = 8 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 896) + 3 * (3584 + 8192))
    assert "1,499,205,120 parameters" in shown and f"{adapters:,}  rank 64" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith(budget.MODES)]
    assert {line[0] for line in lines} == {"ddp", "zero1"}
    assert lines[0][2:5] == ["6.1", f"{adapters * 4e-9:.1f}", f"{adapters * 8e-9:.1f}"]
    assert sum(budget.memory(train.ConanConfig(), adapters=adapters).values()) == \
        4 * 1_499_205_120 + 16 * adapters
