"""What is legal but extreme: defined results, by hand, and no dependence on chance."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from dhnm import HardNegativePool
from engine import distributed
from losses import cosent_loss, info_nce, matryoshka
from mask import FULL, MaskSpec
from model import Conan, ConanConfig
from tokenizer import Tokenizer

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 285)


@pytest.fixture
def model(tokenizer):
    model = Conan(ConanConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1,
                              n_embd=8, ffn_dim=8, block_size=32))
    model.init_weights()
    return model


def settings(stage, **changed):
    return train.TrainConfig(stage=stage, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=8,
                             vocab_size=285, block_size=32, passage_len=16, query_len=8,
                             steps=4, batch_size=2, device="cpu", **changed)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---------------------------------------------------------------- the losses

def test_equal_sts_labels_give_zero_and_a_zero_gradient(model, tokenizer):
    cosine = torch.tensor([0.9, -0.2, 0.4], requires_grad=True)
    loss = cosent_loss(cosine, torch.full((3,), 2.5), temperature=0.05)
    loss.backward()
    assert loss.item() == 0 and cosine.grad.tolist() == [0, 0, 0]
    rows = [{"sentence1": "the fox", "sentence2": "the dog", "score": 3.0}] * 2
    batch = data.sts_batch(rows, [0, 1], tokenizer, 8, "")
    loss, scores, _ = train.stage_loss(model, batch, settings("embed_sup"), 0)
    assert loss.item() == 0 and scores is None and not gradients(model).any()


def test_one_sts_pair_has_no_order(model, tokenizer):
    rows = [{"sentence1": "the fox", "sentence2": "the dog", "score": 3.0}]
    loss, *_ = train.stage_loss(model, data.sts_batch(rows, [0], tokenizer, 8, ""),
                                settings("embed_sup"), 0)
    assert loss.item() == 0


def test_a_batch_of_one_without_negatives_has_nothing_to_choose_from():
    query, positive = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    loss, scores, stats = info_nce(query, positive, temperature=0.05, return_stats=True)
    loss.backward()
    assert loss.item() == 0 and scores.shape == (1, 0) and not query.grad.any()
    assert stats["hardest_negative"] == -1


def test_a_batch_of_one_learns_from_its_negatives():
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    loss, scores = info_nce(query, positive, torch.tensor([[[0.8, 0.6]]]), temperature=1.0)
    assert loss.item() == pytest.approx(np.log(1 + np.exp(0.8 - 0.6)), abs=1e-6)
    assert scores.tolist() == [[pytest.approx(0.8)]]


def test_duplicate_positives_are_no_negatives_of_each_other():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    positive = torch.tensor([[0.8, 0.6], [0.8, 0.6], [0.0, 1.0]])
    ids = torch.tensor([5, 5, 6])
    loss, _ = info_nce(query, positive, temperature=1.0, positive_ids=ids)
    cosines = (query @ positive.T).tolist()
    by_hand = [np.log(1 + np.exp(cosines[0][2] - cosines[0][0])),
               np.log(1 + np.exp(cosines[1][2] - cosines[1][1])),
               np.log(1 + np.exp(cosines[2][0] - cosines[2][2])
                      + np.exp(cosines[2][1] - cosines[2][2]))]
    assert loss.item() == pytest.approx(np.mean(by_hand), abs=1e-6)
    everything_equal, _ = info_nce(query, positive, temperature=1.0, positive_ids=torch.zeros(3))
    assert everything_equal.item() == 0


def test_a_zero_vector_gives_finite_losses_and_gradients():
    query = torch.zeros(2, 4, requires_grad=True)
    positive = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    loss, _ = matryoshka(lambda q, p: info_nce(q, p, temperature=0.05), (query, positive), [2, 4])
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(query.grad).all()
    assert torch.isfinite(positive.grad).all()


# ---------------------------------------------------------------- queries without negatives

def contrastive(tokenizer, negatives):
    rows = [{"query": "the", "pos": ["fox"], "neg": ["dog", "lazy"], "prompt": None},
            {"query": "over", "pos": ["quick"], "neg": [], "prompt": None}]
    return data.contrastive_batch("retrieval", rows, [0, 1], tokenizer, 8, 8, "", negatives,
                                  data.Passages(rows))


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_a_query_without_negatives_beside_one_that_has_some(model, tokenizer, micro):
    cfg = settings("embed_sup", micro_batch_size=micro)
    batch = contrastive(tokenizer, np.array([[1, 2], [-1, -1]]))
    loss, scores, _ = train.stage_loss(model, batch, cfg, 0)
    assert torch.isfinite(loss) and scores.shape == (2, 2) and gradients(model).norm() > 0
    pool = HardNegativePool([[1, 2], []], n_negatives=2)
    pool.update([0, 1], scores)
    assert (pool.negatives([1]) == -1).all() and not pool.exhausted[1]


def test_no_query_with_any_negative_equals_in_batch_negatives_only(model, tokenizer):
    cfg = settings("embed_sup")
    without, *_ = train.stage_loss(model, contrastive(tokenizer, np.full((2, 3), -1)), cfg, 0)
    plain, *_ = train.stage_loss(model, contrastive(tokenizer, None), cfg, 0)
    assert without.item() == pytest.approx(plain.item(), abs=1e-6) and plain.item() > 0


@pytest.mark.parametrize("candidates", [[[], [], []], torch.zeros(3, 0, dtype=torch.int64),
                                        torch.full((3, 5), -1)])
@pytest.mark.parametrize("policy", ["v2", "v1", "fixed"])
def test_a_pool_of_size_zero(candidates, policy):
    pool = HardNegativePool(candidates, n_negatives=2, policy=policy, every=1)
    for _ in range(3):
        assert pool.negatives([0, 2]).tolist() == [[-1, -1], [-1, -1]]
        pool.update([0, 2], torch.zeros(2, 2))
    assert pool.stats() == {"replaced": 0, "exhausted": 0, "S": 0.0, "S_0": 0.0}
    again = HardNegativePool(candidates, n_negatives=2, policy=policy)
    again.load_state_dict(pool.state_dict())
    assert again.visits.tolist() == [3, 0, 3]


def test_a_pool_smaller_than_the_number_of_negatives():
    pool = HardNegativePool(torch.tensor([[4, 5]]), n_negatives=7)
    assert pool.negatives([0]).tolist() == [[4, 5, -1, -1, -1, -1, -1]]
    for _ in range(4):                             # all too easy, and nothing to take instead
        pool.update([0], torch.full((1, 7), 0.1))
    assert sorted(pool.negatives([0])[0].tolist()) == [-1] * 5 + [4, 5]
    assert pool.exhausted.tolist() == [True]


def test_mining_where_every_passage_is_a_positive():
    one = np.ones((1, 1), dtype=np.float32)
    assert data.mine(one, one, [[0]], [7], depth=3).tolist() == [[-1, -1, -1]]
    assert data.mine(one, np.ones((4, 1), np.float32), [[0]], [7] * 4, 2).tolist() == [[-1, -1]]
    assert data.mine(np.ones((0, 1), np.float32), one, [], [7], depth=3).shape == (0, 3)


def test_passages_of_rows_that_repeat_each_other():
    rows = [{"query": "q", "pos": ["a", "a"], "neg": ["a", "b", "b"], "prompt": None},
            {"query": "q", "pos": ["b"], "neg": ["c"], "prompt": None}]
    passages = data.Passages(rows)
    assert len(passages) == 3
    assert [set(p) for p in passages.positives] == [{0, 1}, {0, 1}]
    assert passages.given == [[], [2]]             # the other row's positive is no negative


# ---------------------------------------------------------------- short texts

def test_texts_of_no_tokens_are_the_end_of_text_alone(model, tokenizer):
    batch = data.Batch.of("sts", ["", "fox"], [4, 4], tokenizer, np.arange(2))
    assert batch.lengths[0] == 1 and batch.ids[0] == tokenizer.eos_id
    for mask in (FULL, MaskSpec(0.0), MaskSpec(0.5)):
        vectors = model(batch.ids, batch.lengths, mask)
        assert vectors.shape == (2, 8) and torch.isfinite(vectors).all()


def test_a_model_refuses_what_has_no_length(model):
    with pytest.raises(ValueError, match="positive token counts"):
        model(torch.zeros(0, dtype=torch.int64), [], FULL)
    with pytest.raises(ValueError, match="positive token counts"):
        model(torch.zeros(1, dtype=torch.int64), [1, 0], FULL)


@pytest.mark.parametrize("max_len", [1, 2, 3, 5])
def test_sft_of_any_length_predicts_as_many_as_it_reads(model, tokenizer, max_len):
    rows = [{"query": "the quick", "pos": ["brown fox"], "neg": [], "prompt": "over"},
            {"query": "a", "pos": ["b"], "neg": [], "prompt": None}]
    batch = data.sft_batch(rows, [0, 1], tokenizer, max_len, None)
    assert len(batch.ids) == len(batch.targets) == sum(batch.lengths)
    assert max(batch.lengths) <= max_len and (batch.targets != -100).sum() >= 2
    loss, *_ = train.stage_loss(model, batch, settings("sft"), 0)
    assert torch.isfinite(loss) and loss > 0


def test_one_example_and_one_step():
    assert data.shuffled(np.arange(5), 1, seed=0).tolist() == [0] * 5
    assert train.lr_at(0, settings("sft")) > 0
    once = settings("embed_weak")
    object.__setattr__(once, "steps", 1)
    assert train.stage_mask(once, 0).alpha == 1.0              # the last step is bidirectional
    assert train.lr_at(0, once) == once.learning_rate


@pytest.mark.parametrize("seed", [0, 1, 2 ** 31, 2 ** 62])
def test_seeds_of_any_size(seed):
    order = data.shuffled(np.arange(100), 50, seed)
    assert sorted(order[:50]) == list(range(50))
    assert data.task_of_step(np.arange(10), [1.0], seed).tolist() == [0] * 10
    train.distributed.seed_everything(seed)


# ---------------------------------------------------------------- chance

ORDER = """
import hashlib, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import data, train
from mixture import build_tasks, load_tokenizer
from engine.distributed import World
import torch

found = []
for stage in ("pretrain", "sft", "embed_sup"):
    cfg = train.TrainConfig(
        stage=stage, out="out", text=("text.jsonl",), pairs=("pairs.jsonl",),
        retrieval=("pairs.jsonl",), sts=("sts.jsonl",), n_embd=8, n_head=2, n_kv_head=1, ffn_dim=8,
        vocab_size=300, block_size=32, passage_len=16, query_len=8, batch_size=4, device="cpu")
    size = int(sys.argv[2])
    for rank in range(size):
        world = World(0, 1, torch.device("cpu"))   # nobody to wait for: ranks one after the other
        tasks = build_tasks(cfg, load_tokenizer(cfg, world), world)
        for task, _ in tasks:
            task.world = World(rank, size, torch.device("cpu"))
        found.append([[task.kind, *task.batch(k).rows.tolist()] for k in range(20)
                      for task, _ in tasks])
    found.append(data.task_of_step(np.arange(50), [w for _, w in tasks], cfg.seed).tolist())
    ids = tasks[0][0].batch(3).ids if size == 1 else torch.zeros(1)
    found.append(hashlib.sha256(ids.numpy().tobytes()).hexdigest())
found.append(hashlib.sha256(open("out/tokenizer.tiktoken", "rb").read()).hexdigest())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """Return {(hash seed, ranks): what was found}."""
    found = {}
    for hash_seed, ranks in (("1", 1), ("2", 1), ("2", 2), ("3", 4)):
        folder = tmp_path_factory.mktemp(f"seed{hash_seed}")
        pairs = [{"query": f"question {i}", "pos": [f"answer {i}"]} for i in range(30)]
        made = {"text": [{"text": f"some text number {i}"} for i in range(99)], "pairs": pairs,
                "sts": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i % 3}
                        for i in range(20)]}
        for kind, rows in made.items():
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = subprocess.run(
            [sys.executable, "-c", ORDER, str(ROOT), str(ranks)], cwd=folder, text=True,
            capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed,
                                                   "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found[hash_seed, ranks] = json.loads(done.stdout)
    return found


def test_the_order_does_not_depend_on_pythons_hash_seed(orders):
    assert orders["1", 1] == orders["2", 1]


@pytest.mark.parametrize("key, ranks", [(("2", 2), 2), (("3", 4), 4)])
def test_the_order_does_not_depend_on_the_number_of_ranks(orders, key, ranks):
    """Dealt to W ranks, each step's examples in rank order are those of one process."""
    alone, dealt = orders["1", 1], orders[key]
    for stage in range(3):
        batches, draw, _ = alone[3 * stage:3 * stage + 3]
        parts = dealt[stage * (ranks + 2):stage * (ranks + 2) + ranks]
        together = [[kind, *(row for part in parts for row in part[i][1:])]
                    for i, (kind, *_) in enumerate(batches)]
        assert together == batches and dealt[stage * (ranks + 2) + ranks] == draw
    assert alone[-1] == dealt[-1]                  # the tokenizer


def test_a_block_of_the_last_step_is_not_paged_in_anew():
    """Page faults of asking for 200 MB again: 51,200 of 4 kB each time, were it handed back."""
    if distributed._glibc() is None:
        pytest.skip("not glibc")
    script = """
import resource, torch
from engine import distributed
distributed.keep_freed_memory()
faults = []
for _ in range(4):
    torch.ones(50_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) < 1000, done.stdout + done.stderr


def test_freed_memory_goes_back_once_the_process_is_large():
    """Blocks of changing size leave holes that glibc keeps: a long run was killed for them."""
    library = distributed._glibc()
    if library is None:
        pytest.skip("not glibc")
    distributed.keep_freed_memory()
    try:
        blocks = [np.ones(20_000 + 7 * i) for i in range(1500)]          # 240 MB and more
        guard = blocks[-1]
        held = distributed._resident_pages()
        del blocks
        distributed.release_memory(share=0.999)
        assert distributed._resident_pages() > 0.7 * held        # far below its share: kept
        distributed.release_memory(share=0)
        assert distributed._resident_pages() < held - 30_000 and guard[0] == 1
    finally:
        for parameter, value in ((-4, 65536), (-1, 2 ** 17), (-2, 2 ** 17)):
            library.mallopt(parameter, value)                            # glibc's defaults
