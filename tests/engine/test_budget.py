"""The arithmetic of --dry_run: by hand, against the model, and against what a step allocates."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from dhnm import HardNegativePool
from engine import budget, kernels
from engine.microbatch import backward
from mask import FULL
from model import Conan, ConanConfig

PAPER = ConanConfig()                       # PAPER Sec. 4.2
TINY = ConanConfig(vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, ffn_dim=256,
                   block_size=512)


def test_full_size_by_hand():
    assert budget.parameters(PAPER) == {
        "embedding": 150_000 * 3584,                       # 537,600,000, once: tied
        "attention": 8 * (3584 * 3584 * 2 + 3584 * 896 * 2),       # q and o; k and v of 8 x 112
        "ffn": 8 * 3 * 3584 * 8192,
        "norms": 17 * 3584}
    assert sum(budget.parameters(PAPER).values()) == 1_499_205_120


@pytest.mark.parametrize("shape", [PAPER, TINY, ConanConfig(n_layer=3, n_kv_head=32, ffn_dim=100)])
def test_parameters_are_those_of_the_model(shape):
    with torch.device("meta"):
        assert Conan(shape).count_params() == sum(budget.parameters(shape).values())


def test_memory_by_hand():
    n = 1_499_205_120
    assert sum(budget.memory(PAPER).values()) == 16 * n
    assert budget.memory(PAPER, "zero1", 8) == {"weights": 4 * n, "gradients": 4 * n,
                                               "optimizer": n}
    assert budget.memory(PAPER, "fsdp", 16) == {"weights": n / 4, "gradients": n / 4,
                                               "optimizer": n / 2}
    assert budget.memory(PAPER, "ddp", 64) == budget.memory(PAPER)
    # fsdp gathers the embedding in float32, and its gradient; two blocks and a gradient in bfloat16
    assert budget.unsharded(PAPER) == 8 * 537_600_000 + 6 * (961_544_192 // 8)


def test_flops_by_hand():
    dense = 961_544_192
    assert budget.flops(PAPER, {1: 1}) == 6 * dense + 12 * 8 * 3584
    # 3 texts of 10 and 2 of 20 tokens, causal, with logits
    assert budget.flops(PAPER, {10: 3, 20: 2}, lm=True) == \
        70 * 6 * (dense + 537_600_000) + (3 * 10 * 10 + 2 * 20 * 20) * 6 * 8 * 3584


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    model = Conan(TINY).init_weights()
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        # bidirectional, its attention in plain matmuls
        model(torch.zeros(400, dtype=torch.int64), [100] * 4).sum().backward()
    assert counter.get_total_flops() == pytest.approx(budget.flops(TINY, {100: 4}), rel=0.1)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time; `known` were made before."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.most = {x.untyped_storage()._cdata: 0 for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and (storage := x.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_activations_are_what_a_step_allocates(recompute, head):
    shape = ConanConfig(vocab_size=5000, n_layer=3, n_head=4, n_kv_head=2, n_embd=256, ffn_dim=768,
                        block_size=512)
    model = Conan(shape, ops=kernels.pick("cpu")).init_weights()
    model.checkpointing, ids = int(recompute), torch.zeros(3 * 320, dtype=torch.int64)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)               # `memory` counts them
    with Peak([p.grad for p in model.parameters()]) as peak, torch.autocast("cpu", torch.bfloat16):
        backward(model(ids, [320] * 3, FULL, ids if head else None).sum())
    assert budget.activations(shape, len(ids), recompute, head) == \
        pytest.approx(peak.most, rel=0.1)


def test_a_dry_run_prints_and_allocates_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a dry run trains nothing"))
    config = train.Path(train.__file__).parent / "config/full/embed_weak.py"
    train.main([str(config), "--dry_run", f"--out={tmp_path / 'x'}"])
    shown = capsys.readouterr().out
    assert "1,499,205,120 parameters (1,499.2M)" in shown and "128 texts" in shown
    assert f"{64 * (32_768 + 32_768):,} tokens" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(budget.MODES)]
    # autocast's copies of the blocks, 961.5M weights of 2 bytes: not where fsdp gathers bfloat16
    assert float(rows[5][6]) - float(rows[9][6]) == pytest.approx(1.9, abs=0.1)
    assert [(r[0], r[1]) for r in rows] == [(m, str(w)) for m in budget.MODES
                                            for w in budget.WORLDS]
    assert rows[0][2:5] == ["6.0", "6.0", "12.0"] and rows[9][2:6] == ["0.7", "0.7", "1.5", "5.0"]
    assert not (tmp_path / "x").exists()


def test_a_pass_just_too_short_to_recompute_is_counted():
    shape, embed = ConanConfig(), train.TrainConfig(stage="embed_weak", checkpointing=1000)
    long = budget.activations(shape, 1000, True)
    short = budget.activations(shape, 999, False)
    assert budget.largest_pass(embed, shape, 999, False, True) == short > long
    assert budget.largest_pass(embed, shape, 1000, False, True) == short
    lm = train.TrainConfig(stage="pretrain", checkpointing=1000)           # has no shorter one
    assert budget.largest_pass(lm, shape, 1000, False, True) == long


def test_a_micro_batch_is_counted_by_its_longest_texts():
    cfg = train.TrainConfig(stage="embed_sup", batch_size=8, n_negatives=3, query_len=10,
                            passage_len=20, micro_batch_size=5)
    texts = budget.step_texts(cfg)
    assert texts == {10: 8, 20: 32}
    assert budget.pass_tokens(cfg, texts, 1) == 100        # five passages
    assert budget.pass_tokens(cfg, texts, 8) == 4 * 20 + 10        # one query and its passages


def test_stage_4_counts_its_largest_task_and_each_tasks_visits():
    cfg = train.TrainConfig(stage="embed_sup", steps=30, batch_size=8, batch_sizes={"sts": 100},
                            n_negatives=3, query_len=10, passage_len=20,
                            task_weights={"retrieval": 2.0, "clr": 2.0, "sts": 100.0})
    assert budget.step_texts(cfg) == {10: 200}             # two sentences a row, 2,000 tokens
    # weight over batch: 0.25, 0.25 and 1, so 5, 5 and 20 of the 30 steps
    assert budget.visits(cfg) == pytest.approx({"retrieval": 40, "clr": 40, "sts": 2000})


def test_what_comes_before_the_first_step_by_hand():
    law = {part: {"seconds": seconds} for part, seconds in (
        ("index of text", 60), ("token shards", 120), ("index of stage 4", 60),
        ("passage tables", 120), ("pools of mined rows", 180), ("index of pairs", 60))}
    law |= {"bytes": {"a token of text": 5, "a pair": 200}, "exact search": {"share": 0.5},
            "disk": {"a token": 4, "a row of stage 4": 300}}
    assert budget.start_minutes(law, "pretrain", {"text": 2e9}, 4) == {"index": 2.5, "tokens": 1000}
    assert budget.start_minutes(law, "sft", {"pairs": 1e7}, 2) == {"index": 1}
    found = budget.start_minutes(law, "embed_sup", {"clr": 2e6, "sts": 1e6}, 2, PAPER)
    assert [found[name] for name in ("index", "tables", "pools")] == [1.5, 2, 3]
    # 2M queries and 4M passages of 256 tokens, 2 FLOP a weight; two cards at half of 300 TFLOP/s
    assert found["embedding"] == pytest.approx(
        6e6 * 256 * 2 * (1_499_205_120 - 537_600_000) / (3e14 * 2 * 0.5) / 60)
    cfg = train.TrainConfig(stage="embed_sup", pool_size=50, n_negatives=7)
    pool = HardNegativePool(torch.zeros(10, 50, dtype=torch.int32), 7)
    held = sum(x.nbytes for x in vars(pool).values() if torch.is_tensor(x))
    assert budget.start_bytes(law, "embed_sup", {"clr": 10, "sts": 5}, cfg) == {
        "disk": 15 * 300, "pools": held}
    assert budget.start_bytes(law, "pretrain", {"text": 7}, cfg) == {"disk": 28}
    assert budget.start_bytes(law, "sft", {"pairs": 7}, cfg) == {"disk": 56}
