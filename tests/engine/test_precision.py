"""bfloat16 against float32: a training run ends at the same place, within a stated tolerance.

Matmuls are rounded to 8 bits; weights, normalisation, losses and scores stay in float32. Tolerance
after 40 steps: the mean loss of the last ten within 1 % of the first loss, which is what there was
to learn, and embeddings within a cosine of 0.995 on average, 0.97 at worst.
"""

import pytest
import torch

import data
import train
from engine.distributed import World
from model import Conan

STEPS = 40


def batches(stage):
    """Make STEPS batches: pairs that share rare tokens, or text that counts upwards."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        lengths = torch.randint(4, 12, (32,), generator=generator).tolist()
        ids = torch.randint(0, 40, (sum(lengths),), generator=generator)
        if stage == "pretrain":
            ids = (torch.arange(sum(lengths)) + step) % 40
            yield data.Batch("text", ids, lengths, None, (ids + 1) % 40)
            continue
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        topics = 40 + torch.randperm(60, generator=generator)[:16]
        ids[starts[:16]] = ids[starts[16:]] = topics
        yield data.Batch("pairs", ids, lengths, None, query_ids=torch.arange(16),
                         positive_ids=torch.arange(16))


def trained(stage, dtype):
    """Return (losses, embeddings of one batch) of a run in this dtype."""
    cfg = train.TrainConfig(stage=stage, n_embd=64, n_head=4, n_kv_head=2, n_layer=1, ffn_dim=96,
                            norm_eps=1e-5, embed_std=0.02, embed_rank_power=0.0, attention_dim=0,
                            vocab_size=258, steps=STEPS, learning_rate=3e-3, block_size=96)
    model = Conan(cfg.model_config()).init_weights(torch.Generator().manual_seed(3))
    world, losses = World(0, 1, torch.device("cpu")), []
    optimizer = train.build_optimizer(model, cfg)
    for step, batch in enumerate(batches(stage)):
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, cfg)
        with world.autocast(dtype):
            losses.append(float(train.stage_loss(model, batch, cfg, step)[0]))
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), world.autocast(dtype):
        vectors = model(batch.ids, batch.lengths, train.stage_mask(cfg, STEPS - 1))
    assert vectors.dtype == torch.float32
    return losses, torch.nn.functional.normalize(vectors, dim=1)


@pytest.mark.parametrize("stage", ["pretrain", "embed_weak"])
def test_bfloat16_ends_where_float32_does(stage):
    (exact, vectors), (rough, near) = (trained(stage, dtype) for dtype in ("float32", "bfloat16"))
    assert exact[-1] < 0.7 * exact[0]                      # it learns something
    assert rough != exact                                  # and bfloat16 is at work
    ends = [sum(losses[-10:]) / 10 for losses in (exact, rough)]
    assert abs(ends[1] - ends[0]) < 0.01 * exact[0]
    cosine = (vectors * near).sum(1)
    assert cosine.mean() > 0.995 and cosine.min() > 0.97
