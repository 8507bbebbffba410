"""The two-pass step: its gradient is that of the whole batch, with one synchronisation."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn as nn

from engine.microbatch import two_pass
from losses import matryoshka
from tiny import nce, relative


def small_encoder():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))


def contrastive(x):
    """6 queries, 6 positives, 2 negatives each, at two widths."""
    q, p, h = x.split([6, 6, 12])
    ids = torch.tensor([0, 1, 2, 3, 1, 4])
    return matryoshka(partial(nce, temperature=0.1, positive_ids=ids),
                      (q, p, h.view(6, 2, -1)), [3, 6])


@pytest.mark.parametrize("sizes", [[24], [10, 14], [5, 5, 5, 5, 4], [1] * 24], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_passes_equal_one(sizes, autocast):
    inputs = torch.randn(24, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = small_encoder()
        loss, scores = contrastive(whole(inputs).float())
        loss.backward()
        chunked = small_encoder()
        got, same = two_pass(chunked, inputs.split(sizes), contrastive)
    close = 0.02 if autocast else 2e-6
    assert got.item() == pytest.approx(loss.item(), rel=close) and not got.requires_grad
    assert torch.allclose(same, scores, atol=close)
    for a, b in zip(chunked.parameters(), whole.parameters()):
        assert relative(a.grad, b.grad) < close


@pytest.mark.parametrize("sizes", [[24], [12, 12], [6] * 4], ids=str)
def test_all_chunks_but_the_last_run_without_synchronisation(sizes):
    encoder, log = small_encoder(), []

    @contextlib.contextmanager
    def no_sync():
        log.append("open")
        yield
        log.append("close")

    def encode(chunk):
        log.append("encode" if torch.is_grad_enabled() else "embed")
        return encoder(chunk)

    two_pass(encode, torch.randn(24, 7).split(sizes), contrastive, no_sync)
    n = len(sizes)
    first = ["embed"] * n if n > 1 else []
    assert log == first + ["open", "encode", "close"] * (n - 1) + ["encode"]


@pytest.mark.parametrize("sizes", [[24], [12, 12]], ids=str)
def test_a_loss_is_handed_float32(sizes):
    encoder, seen = nn.Linear(7, 6), []

    def loss_fn(x):
        seen.append(x.dtype)
        return x.sum(), None
    with torch.autocast("cpu", torch.bfloat16):
        two_pass(encoder, torch.randn(24, 7).split(sizes), loss_fn)
    assert seen == [torch.float32]
