"""Adapters: by hand, against autograd on the plain model, and through train.py from end to end."""
import copy
import json
from pathlib import Path

import pytest
import torch

import train
from embed import Embedder
from engine import budget, checkpoint, distributed
from engine.distributed import compile_blocks
from lora import adapted, add_lora, load_lora, lora_state_dict, merge, merged_state_dict
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig
from ranks import SMALL, on_ranks, run, write_rows

TINY = ConanConfig(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=40,
                   block_size=64)
MASKS = [CAUSAL, MaskSpec(0.3), MaskSpec(0.7, "col"), MaskSpec(0.5, "row", "logits"), FULL]
LENGTHS = [9, 30, 1, 28]
IDS = torch.arange(sum(LENGTHS)) * 7 % 61


def base():
    return Conan(TINY).init_weights(torch.Generator().manual_seed(1))


def moved(rank=4, alpha=None):
    """Return a model with adapters that have left zero, as training moves them."""
    model = add_lora(base(), rank, alpha, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def gradients(model, mask=FULL):
    model.zero_grad()
    (model(IDS, LENGTHS, mask) * torch.arange(1, 33)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the arithmetic

def test_two_by_two_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    add_lora(model, rank=1, alpha=2)
    model[0].lora_a.data = torch.tensor([[1.0, 2.0]])
    model[0].lora_b.data = torch.tensor([[3.0], [4.0]])
    # W + 2 / 1 * [3, 4]^T [1, 2] = [[1 + 6, 12], [8, 1 + 16]]
    assert model[0].weight.tolist() == [[7, 12], [8, 17]]
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-5, -9]
    assert dict(model.named_parameters())["0.weight"].tolist() == [[1, 0], [0, 1]]
    assert type(merge(model)[0]) is torch.nn.Linear
    assert model.state_dict()["0.weight"].tolist() == [[7, 12], [8, 17]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_step_0_is_the_base_and_merging_changes_no_bit(mask, dtype):
    model, merged = moved(), merge(moved())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.no_grad():
        plain = base()(IDS, LENGTHS, mask)
        assert torch.equal(add_lora(base(), 4)(IDS, LENGTHS, mask), plain)
        out = model(IDS, LENGTHS, mask)
        assert (out - plain).norm() > 0.01 * plain.norm()
        assert torch.equal(merged(IDS, LENGTHS, mask), out)


def test_all_projections_have_adapters_and_nothing_else_trains():
    model, plain = add_lora(base(), 4), base()
    names = {name.rsplit(".", 1)[1] for name in adapted(model)}
    assert names == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(adapted(model)) == 7 * TINY.n_layer
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 14 * TINY.n_layer and all(".lora_" in name for name in trained)
    assert set(plain.state_dict()) == set(model.state_dict()) - set(trained)
    found = gradients(moved())
    assert {name for name, grad in found.items() if grad is not None} == set(trained)
    assert all(float(found[name].norm()) > 0 for name in trained)
    model.zero_grad()
    model(IDS, LENGTHS, CAUSAL, targets=IDS.roll(-1)).backward()       # stages 1 and 2 could, too
    assert model.embed_tokens.weight.grad is None
    # B is zero at the start, so A's gradient is
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} \
        == {name for name in trained if name.endswith("lora_b")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_gradients_follow_from_those_of_the_merged_weights(mask, checkpointing):
    """d loss / dB = scale * G A^T and d loss / dA = scale * B^T G, with G of the plain model."""
    model = moved(rank=3, alpha=7.5)
    plain = gradients(merge(copy.deepcopy(model)), mask)
    model.checkpointing = checkpointing
    found = gradients(model, mask)
    for name, layer in adapted(model).items():
        g = plain[f"{name}.weight"]
        for part, right in (("lora_a", layer.lora_b.T @ g), ("lora_b", g @ layer.lora_a.T)):
            wanted = 2.5 * right
            assert (found[f"{name}.{part}"] - wanted).norm() < 1e-5 * wanted.norm(), (name, part)


def test_an_update_has_the_adapters_rank_and_the_base_stays():
    model, before = add_lora(base(), 3), base().state_dict()
    optimizer = train.build_optimizer(model, train.TrainConfig(learning_rate=0.01))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == \
        sum(p.numel() for p in model.parameters() if p.requires_grad)
    for _ in range(5):
        gradients(model)
        optimizer.step()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    merged = merge(model).state_dict()
    assert list(merged) == list(before)
    for name, value in before.items():
        update = (merged[name] - value).double()
        if name.endswith("_proj.weight"):
            assert torch.linalg.matrix_rank(update, rtol=1e-4) == 3, name
        else:
            assert not update.any(), name
    assert all(p.requires_grad for p in model.parameters())


def test_the_merged_state_dict_is_the_one_that_merge_leaves():
    model = moved()
    there = copy.deepcopy(model.state_dict())
    found = merged_state_dict(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in there.items())
    base().load_state_dict(found)                          # the plain names, all of them
    wanted = merge(model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.extras
def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.GELU(),
                                torch.nn.Linear(5, 4, bias=False))
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False))
    ours, x = add_lora(plain, 3, alpha=5), torch.randn(7, 6)
    for i in (0, 2):
        layer = theirs.base_model.model[i]
        ours[i].lora_a.data = layer.lora_A["default"].weight.data
        ours[i].lora_b.data = layer.lora_B["default"].weight.data
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(merge(ours)(x), theirs.merge_and_unload()(x), atol=1e-6)


def test_compiled_blocks_give_the_same_and_compile_once():
    torch._dynamo.reset()
    plain, compiled = moved(), moved()
    compile_blocks(compiled, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    graphs = []
    for mask in MASKS[1:4]:
        wanted, found = gradients(plain, mask), gradients(compiled, mask)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for name, grad in wanted.items():
            assert grad is None and found[name] is None or \
                (found[name] - grad).norm() <= 1e-5 * grad.norm(), name
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}


# ---------------------------------------------------------------- files

def test_adapters_alone_go_through_a_file_onto_the_base(tmp_path):
    model = moved(alpha=10.0)
    where = checkpoint.save(tmp_path, 1, {"lora.pt": lora_state_dict(model),
                                          "model.pt": base().state_dict()})
    loaded = load_lora(base(), checkpoint.load(where, "lora.pt"))
    assert torch.equal(loaded(IDS, LENGTHS), model(IDS, LENGTHS))
    numbers = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers < (where / "lora.pt").stat().st_size < numbers + 20_000


def test_adapters_of_another_shape_are_refused_and_leave_the_model_alone():
    wide = Conan(ConanConfig(**{**vars(TINY), "ffn_dim": 48}))
    state = copy.deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match=r"down_proj.lora_a has shape \(4, 40\) in the file, "
                                         r"\(4, 48\) here"):
        load_lora(wide, lora_state_dict(moved()))
    assert not adapted(wide) and all(p.requires_grad for p in wide.parameters())
    assert all(torch.equal(wide.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(moved(), 4)
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        add_lora(base(), 0)


# ---------------------------------------------------------------- through train.py

STAGE = """passage_len = 32
query_len = 16
batch_size = 12
n_negatives = 3
pool_size = 6
steps = 6
learning_rate = 0.01
"""
RANK = "--lora_rank=4"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_rows(tmp_path_factory.mktemp("rows"))
    for stage, before in (("sft", ""), ("embed_weak", "sft"), ("embed_sup", "embed_weak")):
        previous = str(folder / f"{before}.py") if before else ""
        (folder / f"{stage}.py").write_text(f"stage = {stage!r}\nprevious = {previous!r}\n{STAGE}")
    return folder


def command(files, stage, out, *more):
    """Return the command line of a stage whose predecessors are trained first."""
    rows = (f"--{kind}={files / kind}.jsonl" for kind in ("text", "pairs", "retrieval", "sts"))
    return [str(files / f"{stage}.py"), f"--out={out}", *SMALL, "--learning_rate=0.01", *rows,
            *more]


def train_stage(files, stage, out, *more):
    argv = command(files, stage, out, *more)
    run(distributed.World(0, 1, torch.device("cpu")), argv)
    return log(out, stage)


def log(out, stage):
    lines = [json.loads(line) for line in open(Path(out) / stage / "log.jsonl")]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_share")}
            for line in lines]


def load(out, stage, name):
    return checkpoint.load(checkpoint.latest(Path(out) / stage), name)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Train stage 2 with all weights, and 3 and 4 with adapters, by asking for stage 4."""
    out = tmp_path_factory.mktemp("whole")
    train_stage(files, "embed_sup", out, RANK)
    return out


def test_stages_3_and_4_train_adapters_and_stage_2_all_weights(whole):
    ranks = {stage: json.loads(load(whole, stage, "config.json"))["train"]["lora_rank"]
             for stage in ("sft", "embed_weak", "embed_sup")}
    assert ranks == {"sft": 0, "embed_weak": 4, "embed_sup": 4}
    assert not (checkpoint.latest(whole / "sft") / "lora.pt").exists()
    start = load(whole, "sft", "model.pt")
    for stage in ("embed_weak", "embed_sup"):
        end, apart = load(whole, stage, "model.pt"), load(whole, stage, "trainer.pt")["unmerged"]
        assert list(end) == list(start)
        for name, value in start.items():
            update = (end[name] - value).double()
            assert torch.equal(apart[name], value), name   # the base; of stage 4 the merged one
            if not name.endswith("_proj.weight"):
                assert not update.any(), name
            else:
                assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 4 and update.any(), name
        start = end
    moments = load(whole, "embed_sup", "trainer.pt")["optimizer"]["state"].values()
    assert {min(m["exp_avg"].shape) for m in moments} == {4} and len(moments) == 28


def test_the_adapters_alone_turn_the_stage_before_into_this_one(whole):
    texts = ["sort a list", "open a file", "x"]
    before, after = (Embedder(whole / s, device="cpu") for s in ("embed_weak", "embed_sup"))
    before.mask = after.mask
    wanted = after.encode(texts)
    assert abs(before.encode(texts) - wanted).max() > 1e-3
    load_lora(before.model, load(whole, "embed_sup", "lora.pt"))
    assert (before.encode(texts) == wanted).all()


def test_a_killed_run_goes_on_bit_for_bit(files, whole, tmp_path, monkeypatch):
    for stage in ("sft", "embed_weak"):
        (tmp_path / stage).symlink_to(whole / stage)
    (tmp_path / "tokenizer.tiktoken").write_bytes((whole / "tokenizer.tiktoken").read_bytes())
    real = train.stage_loss

    def dies(model, batch, cfg, step, *rest):
        if step == 3:                                      # after the checkpoint of step 2
            raise KeyboardInterrupt
        return real(model, batch, cfg, step, *rest)
    monkeypatch.setattr(train, "stage_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_stage(files, "embed_sup", tmp_path, RANK, "--save_every=2")
    Embedder(tmp_path / "embed_sup", device="cpu").encode("plain weights in the middle, too")
    monkeypatch.setattr(train, "stage_loss", real)
    torch.manual_seed(12345)
    assert train_stage(files, "embed_sup", tmp_path, RANK, "--save_every=2") == \
        log(whole, "embed_sup")
    for name in ("model.pt", "lora.pt"):
        found, wanted = (load(out, "embed_sup", name) for out in (tmp_path, whole))
        if name == "lora.pt":
            assert found.pop("alpha") == wanted.pop("alpha") == 8
            found, wanted = found["adapters"], wanted["adapters"]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found, wanted = (load(out, "embed_sup", "trainer.pt")["optimizer"]["state"]
                     for out in (tmp_path, whole))
    assert all(torch.equal(found[i][key], wanted[i][key]) for i in wanted for key in wanted[i])
    with pytest.raises(ValueError, match="lora_rank=4 there, 5 now"):
        train_stage(files, "embed_sup", tmp_path, "--lora_rank=5")


def test_micro_batches_change_nothing_but_the_memory(files, whole, tmp_path):
    for stage in ("sft", "embed_weak"):
        (tmp_path / stage).symlink_to(whole / stage)
    (tmp_path / "tokenizer.tiktoken").write_bytes((whole / "tokenizer.tiktoken").read_bytes())
    lines = train_stage(files, "embed_sup", tmp_path, RANK, "--micro_batch_size=5")
    for line, wanted in zip(lines, log(whole, "embed_sup"), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=2e-4)


@pytest.mark.parametrize("mode", ["ddp", "zero1"])
def test_two_processes_train_as_one_does(files, whole, tmp_path, mode):
    for stage in ("sft", "embed_weak"):
        (tmp_path / stage).symlink_to(whole / stage)
    (tmp_path / "tokenizer.tiktoken").write_bytes((whole / "tokenizer.tiktoken").read_bytes())
    on_ranks(2, run, command(files, "embed_sup", tmp_path, RANK, f"--parallel={mode}"))
    for line, wanted in zip(log(tmp_path, "embed_sup"), log(whole, "embed_sup"), strict=True):
        assert line["task"] == wanted["task"]
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), (line["step"], key)
    found, wanted = (load(out, "embed_sup", "model.pt") for out in (tmp_path, whole))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=2e-5) for name in wanted)


def test_fsdp_is_refused():
    with pytest.raises(ValueError, match="lora_rank 4 needs parallel ddp or zero1"):
        train.TrainConfig(lora_rank=4, parallel="fsdp")


def test_a_checkpoint_from_before_a_setting_existed_had_its_default(whole):
    cfg = train.TrainConfig()
    saved = {k: v for k, v in json.loads(json.dumps(vars(cfg))).items() if k != "lora_rank"}
    train.check_same(cfg, saved, "here")
    with pytest.raises(ValueError, match="here was trained with lora_rank=0 there, 4 now"):
        train.check_same(train.TrainConfig(lora_rank=4), saved, "here")


def test_a_dry_run_counts_what_trains(capsys):
    config = Path(train.__file__).parent / "config/full/embed_weak.py"
    train.main([str(config), "--dry_run", "--lora_rank=64"])
    shown = capsys.readouterr().out
    # in + out of q and o, k and v, gate and up and down
    adapters = 8 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 896) + 3 * (3584 + 8192))
    assert "1,499,205,120 parameters" in shown and f"adapters     {adapters:>14,}" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(budget.MODES)]
    assert {row[0] for row in rows} == {"ddp", "zero1"}
    assert rows[0][2:5] == ["6.1", f"{adapters * 4e-9:.1f}", f"{adapters * 8e-9:.1f}"]
    memory = budget.memory(ConanConfig(), adapters=adapters)
    assert sum(memory.values()) == 4 * 1_499_205_120 + 16 * adapters
