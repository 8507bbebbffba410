"""What is legal but extreme: defined results, by hand, and no dependence on chance."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import train
from clr import allot
from dhnm import HardNegativePool
from engine import distributed
from engine.order import shuffled
from losses import info_nce, matryoshka
from mask import CAUSAL, FULL, MaskSpec
from model import Conan
from ranks import ROOT, tiny_config, write_lines


@pytest.fixture
def model():
    return Conan(tiny_config().model_config()).init_weights()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batch_of(tokenizer, kind, rows, stage="embed_sup", pool=None):
    """Return the batch of all rows."""
    cfg = tiny_config(stage, batch_size=len(rows))
    task = data.Task(kind, cfg, tokenizer, distributed.ALONE,
                     [write_lines(data.Path(f"{kind}.jsonl"), rows)])
    task.pool = pool
    return task.batch(0)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)        # the caches go to out/cache


# ---------------------------------------------------------------- the losses

def test_a_zero_vector_gives_finite_losses_and_gradients():
    query = torch.zeros(2, 4, requires_grad=True)
    positive = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    loss, _ = matryoshka(lambda q, p: info_nce(q, p, temperature=0.05), (query, positive), [2, 4])
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(query.grad).all()
    assert torch.isfinite(positive.grad).all()


# ---------------------------------------------------------------- what the settings of a step do

@pytest.mark.parametrize("stage", ["embed_weak", "embed_sup"])
def test_matryoshka_is_a_part_of_stage_4_alone(model, tokenizer, stage):
    """PAPER App. A: the dims belong to the supervised stage."""
    batch = batch_of(tokenizer, "retrieval", CONTRASTIVE)
    plain, nested = (train.step_loss(model, batch, tiny_config(stage, dims=dims), 0)[0].item()
                     for dims in ((), (4,)))
    assert (plain != nested) == (stage == "embed_sup")


def test_the_full_width_is_trained_besides_the_dims(model, tokenizer):
    batch = batch_of(tokenizer, "retrieval", CONTRASTIVE)
    one, both = (train.step_loss(model, batch, tiny_config(dims=dims), 0)[0].item()
                 for dims in ((4,), (4, 8)))
    assert one == both


@pytest.mark.parametrize("stage, step, settings, mask", [
    ("pretrain", 4, {"schedule": "hard"}, CAUSAL), ("sft", 4, {}, CAUSAL),
    ("embed_weak", 0, {}, CAUSAL), ("embed_weak", 1, {}, MaskSpec(0.25)),
    ("embed_weak", 4, {}, FULL), ("embed_sup", 0, {}, FULL),
    ("embed_weak", 2, {"schedule": "accelerating"}, MaskSpec(0.25)),
    ("embed_weak", 2, {"schedule": "decelerating", "mask_axis": "col"}, MaskSpec(0.75, "col")),
    ("embed_weak", 2, {"mask_apply": "logits"}, MaskSpec(0.5, apply="logits")),
    ("embed_weak", 0, {"schedule": "hard"}, FULL),
    ("embed_weak", 4, {"schedule": "causal"}, CAUSAL),
    ("embed_sup", 4, {"schedule": "causal"}, CAUSAL)])
def test_the_mask_of_a_step(stage, step, settings, mask):
    """Five steps: alpha = step / 4."""
    assert train.stage_mask(tiny_config(stage, steps=5, **settings), step) == mask


# ---------------------------------------------------------------- queries without negatives

CONTRASTIVE = [{"query": "the", "pos": ["fox"], "neg": ["dog", "lazy"]},
               {"query": "over", "pos": ["quick"], "neg": []}]


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_a_query_without_negatives_beside_one_that_has_some(model, tokenizer, micro):
    pool = HardNegativePool([[1, 2], []], n_negatives=2)
    batch, calls = batch_of(tokenizer, "retrieval", CONTRASTIVE, pool=pool), []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, scores = train.step_loss(model, batch, tiny_config(micro_batch_size=micro), 0)
    hook.remove()
    assert len(calls) == {0: 1, 1: 16, 3: 6}[micro]        # 8 texts, in two passes
    assert torch.isfinite(loss) and scores.shape == (2, 2) and gradients(model).norm() > 0
    pool.update(batch.rows, scores)
    assert (pool.negatives([1]) == -1).all() and not pool.exhausted[1]


@pytest.mark.parametrize("candidates", [[[], [], []], torch.zeros(3, 0, dtype=torch.int64),
                                        torch.full((3, 5), -1)])
@pytest.mark.parametrize("policy", ["v2", "fixed"])
def test_a_pool_of_size_zero(candidates, policy):
    pool = HardNegativePool(candidates, n_negatives=2, policy=policy)
    for _ in range(3):
        assert pool.negatives([0, 2]).tolist() == [[-1, -1], [-1, -1]]
        pool.update([0, 2], torch.zeros(2, 2))
    assert pool.stats() == {"replaced": 0, "used": 0, "exhausted": 0, "S": 0.0, "S_0": 0.0}
    again = HardNegativePool(candidates, n_negatives=2, policy=policy)
    again.load_state_dict(pool.state_dict())


# ---------------------------------------------------------------- short texts

def test_texts_of_no_tokens_are_the_end_of_text_alone(model, tokenizer):
    """So are all texts where the limit is one token."""
    batch = data.Batch.of("sts", ["", "fox"], [4, 1], tokenizer, np.arange(2))
    assert batch.lengths == [1, 1] and batch.ids.tolist() == [tokenizer.eos_id] * 2
    assert batch.truncated == 1
    for mask in (FULL, MaskSpec(0.0), MaskSpec(0.5)):
        vectors = model(batch.ids, batch.lengths, mask)
        assert vectors.shape == (2, 8) and torch.isfinite(vectors).all()


@pytest.mark.parametrize("max_len", [1, 2, 3, 5])
def test_sft_of_any_length_predicts_as_many_as_it_reads(model, tokenizer, max_len):
    examples = [("over", "the quick", "brown fox"), ("", "a", "b")]
    batch = data.sft_batch(examples, [0, 1], tokenizer, max_len)
    assert len(batch.ids) == len(batch.targets) == sum(batch.lengths)
    assert max(batch.lengths) <= max_len and (batch.targets != -100).sum() >= 2
    loss, _ = train.step_loss(model, batch, tiny_config("sft"), 0)
    assert torch.isfinite(loss) and loss > 0


def test_one_example_and_one_step():
    assert shuffled(np.arange(5), 1, seed=0).tolist() == [0] * 5
    once = tiny_config("embed_weak", steps=1)
    assert train.stage_mask(once, 0).alpha == 1.0              # the last step is bidirectional
    assert train.lr_at(0, once) == once.learning_rate


# ---------------------------------------------------------------- chance

ORDER = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_edge_cases import batches
print(json.dumps(batches()))
"""


def batches():
    """Return the first batches of three stages, the tokenizer's hash, and CLR's shares."""
    pairs = [{"query": f"question {i}", "pos": [f"answer {i}"]} for i in range(30)]
    for kind, rows in {"text": [{"text": f"some text number {i}"} for i in range(99)],
                       "pairs": pairs, "sts": [{"sentence1": f"a {i}", "sentence2": f"b {i}",
                                                "score": i % 3} for i in range(20)]}.items():
        write_lines(data.Path(f"{kind}.jsonl"), rows)
    world, content = distributed.ALONE, []
    for stage in ("pretrain", "sft", "embed_sup"):
        cfg = tiny_config(stage, text=("text.jsonl",), pairs=("pairs.jsonl",), sts=("sts.jsonl",),
                          retrieval=("pairs.jsonl",))
        tokenizer = train.train_tokenizer(cfg)
        tasks = data.build_tasks(cfg, tokenizer, world)
        content += [[task.kind, weight, *task.batch(k).ids.tolist()] for k in range(9)
                    for task, weight in tasks]
    return [*content, tokenizer.fingerprint(), allot(200, seed=5)]


def test_nothing_depends_on_pythons_hash_seed(tmp_path):
    (tmp_path / "other").mkdir()
    done = subprocess.run([sys.executable, "-c", ORDER, str(ROOT)], cwd=tmp_path / "other",
                          text=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == batches()
