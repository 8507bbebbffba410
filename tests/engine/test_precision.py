"""bfloat16 against float32: a training run ends at the same place, within a stated tolerance.

Matmuls round to 8 bits; weights, normalisation, losses and scores stay in float32. Tolerance after
40 steps: the mean loss of the last ten within 1 % of the first loss, which is what there was to
learn, and embeddings within a cosine of 0.995 on average, 0.97 at worst.
"""

import dataclasses

import pytest
import torch

from engine import kernels
from engine.microbatch import two_pass
from losses import info_nce
from mask import CAUSAL, MaskSpec, alpha
from model import Conan
from tiny import CONFIG

STEPS = 40


def batches(kind):
    """Yield (ids, lengths, targets) STEPS times: pairs with a rare token in common, or counting."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        lengths = torch.randint(4, 12, (32,), generator=generator).tolist()
        ids = torch.randint(0, 40, (sum(lengths),), generator=generator)
        if kind == "text":
            ids = (torch.arange(sum(lengths)) + step) % 40
            yield ids, lengths, (ids + 1) % 40
            continue
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        topics = 40 + torch.randperm(60, generator=generator)[:16]
        ids[starts[:16]] = ids[starts[16:]] = topics
        yield ids, lengths, None


def nce(x):
    return info_nce(*x.chunk(2), temperature=0.05)


def trained(kind, dtype):
    """Return (losses, embeddings of one batch) of a run in this dtype."""
    shape = dataclasses.replace(CONFIG, vocab_size=258, n_layer=1, n_embd=64, ffn_dim=96)
    model = Conan(shape, kernels.pick("cpu")).init_weights(torch.Generator().manual_seed(3))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98)), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for step, (ids, lengths, targets) in enumerate(batches(kind)):
        mask = CAUSAL if kind == "text" else MaskSpec(alpha(step, STEPS - 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if kind == "text":
                loss = model(ids, lengths, mask, targets)
                loss.backward()
            else:
                loss, _ = two_pass(lambda c: model(ids, lengths, mask), [None], nce)
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        vectors = model(ids, lengths, mask)
    assert vectors.dtype == torch.float32
    return losses, torch.nn.functional.normalize(vectors, dim=1)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_of_a_loss_is_float32(parts):
    """Backward under autocast would round what the loss computed in float32."""
    grads = []
    for enabled in (False, True):
        x = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            two_pass(lambda part: 1.0 * part, x.split(12 // parts), nce)
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_bfloat16_ends_where_float32_does(kind):
    (exact, vectors), (rough, near) = (trained(kind, dtype) for dtype in ("float32", "bfloat16"))
    assert exact[-1] < 0.7 * exact[0]                      # it learns something
    assert rough != exact                                  # and bfloat16 is at work
    ends = [sum(losses[-10:]) / 10 for losses in (exact, rough)]
    assert abs(ends[1] - ends[0]) < 0.01 * exact[0]
    cosine = (vectors * near).sum(1)
    assert cosine.mean() > 0.995 and cosine.min() > 0.97
