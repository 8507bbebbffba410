"""InfoNCE, CoSENT, Matryoshka, the two-pass step and the chunked LM loss: by hand, by brute force,
and against the functions of torch that they must equal."""

import contextlib
import doctest
import math
import time
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
from losses import cached_backward, cosent_loss, info_nce, lm_cross_entropy, matryoshka

# two queries along the axes; p1 lies on q1, p2 is at cosine 0.6 to q1 and 0.8 to q2
QUERY = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
POSITIVE = torch.tensor([[1.0, 0.0], [0.6, 0.8]])


def softmax_loss(own, *others):
    """-log(e^own / (e^own + sum of e^others)), with plain floats."""
    return math.log(sum(math.exp(x) for x in (own, *others))) - own


def random_batch(b=5, n=3, d=6):
    return torch.randn(b, d), torch.randn(b, d), torch.randn(b, n, d)


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def slope(f, x, direction, eps=1e-2):
    """Return the central difference of f at x; f is float32, so eps is large."""
    return float(f(x + eps * direction) - f(x - eps * direction)) / (2 * eps)


# ---------------------------------------------------------------- InfoNCE, Eq. (1)

def test_two_pairs_by_hand():
    loss, scores = info_nce(QUERY, POSITIVE, temperature=1.0)
    want = (softmax_loss(1.0, 0.6) + softmax_loss(0.8, 0.0)) / 2
    assert loss.item() == pytest.approx(want, abs=1e-6)
    assert scores.shape == (2, 0)
    loss, _ = info_nce(QUERY, POSITIVE, temperature=0.1)
    want = (softmax_loss(10, 6) + softmax_loss(8, 0)) / 2
    assert loss.item() == pytest.approx(want, abs=1e-6)


def test_candidates_are_all_positives_and_everybodys_hard_negatives():
    negatives = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]],                    # of query 1
                              [[0.8, 0.6], [0.0, -1.0]]])                   # of query 2
    loss, scores = info_nce(QUERY, POSITIVE, negatives, temperature=0.5)
    one = softmax_loss(2 * 1.0, 2 * 0.6, 2 * 0.0, 2 * -1.0, 2 * 0.8, 2 * 0.0)
    two = softmax_loss(2 * 0.8, 2 * 0.0, 2 * 1.0, 2 * 0.0, 2 * 0.6, 2 * -1.0)
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-6)
    assert torch.allclose(scores, torch.tensor([[0.0, -1.0], [0.6, -1.0]]))


def test_lengths_of_the_vectors_do_not_matter():
    q, p, h = random_batch()
    loss, scores = info_nce(q, p, h, temperature=0.05)
    other, same = info_nce(3 * q, p / 7, 100 * h, temperature=0.05)
    assert torch.allclose(loss, other) and torch.allclose(scores, same, atol=1e-6)


def test_floor_without_a_temperature():
    """64 candidates at T = 1: even a perfect model is left with log(1 + 63 e^-2) = 2.25."""
    one = torch.ones(1, 1)
    loss, _ = info_nce(one, one, -torch.ones(1, 63, 1), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 63 * math.exp(-2)), abs=1e-6)
    assert loss.item() == pytest.approx(2.25, abs=0.005)
    assert info_nce(one, one, -torch.ones(1, 63, 1), temperature=0.05)[0] < 1e-6


def test_batch_of_one():
    q, p, h = random_batch(b=1, n=2)
    loss, scores, stats = info_nce(q, p, temperature=0.1, return_stats=True)
    assert loss == 0 and scores.shape == (1, 0)
    assert stats["accuracy@1"] == 1 and stats["hardest_negative"] == -1
    loss, scores = info_nce(q, p, h, temperature=0.1)
    cos = F.cosine_similarity(q, torch.cat([p, h[0]]))
    assert loss.item() == pytest.approx(softmax_loss(*(cos / 0.1).tolist()), abs=1e-5)
    assert torch.allclose(scores[0], cos[1:], atol=1e-6)


def test_no_negatives_is_none_or_an_empty_tensor():
    q, p, _ = random_batch()
    assert info_nce(q, p, temperature=0.1)[0] == info_nce(q, p, q.new_zeros(5, 0, 6),
                                                          temperature=0.1)[0]


def test_scores_are_the_detached_cosines_of_ones_own_negatives():
    q, p, h = (x.requires_grad_() for x in random_batch())
    _, scores = info_nce(q, p, h, temperature=0.05)
    assert not scores.requires_grad
    assert torch.allclose(scores, F.cosine_similarity(q[:, None], h, dim=-1), atol=1e-6)


def test_equal_positives_are_no_negatives_of_each_other():
    ids = torch.tensor([7, 7])
    loss, _ = info_nce(QUERY, POSITIVE, temperature=1.0, positive_ids=ids)
    assert loss == 0                                        # nothing else is left
    loss, _ = info_nce(QUERY, POSITIVE, temperature=1.0, positive_ids=torch.tensor([7, 8]))
    assert loss > 0.3


@pytest.mark.parametrize("positive_ids", [None, torch.tensor([1, 2])])
def test_the_positive_of_an_equal_query_is_no_negative(positive_ids):
    loss, _ = info_nce(QUERY, POSITIVE, temperature=1.0, query_ids=torch.tensor([5, 5]),
                       positive_ids=positive_ids)
    assert loss == 0


def test_a_negative_equal_to_a_positive_counts_for_the_others_only():
    negatives = torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]])
    loss, _ = info_nce(QUERY, POSITIVE, negatives, temperature=1.0,
                       positive_ids=torch.tensor([1, 2]), negative_ids=torch.tensor([[2], [3]]))
    one = softmax_loss(1.0, 0.6, 0.0, -1.0)                 # 2 is a negative for query 1 ...
    two = softmax_loss(0.8, 0.0, 0.0)                       # ... and not for query 2
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-6)


@pytest.mark.parametrize("positive_ids", [None, torch.tensor([1, 2])])
def test_an_empty_place_is_not_there(positive_ids):
    q, p, h = (QUERY.clone().requires_grad_(), POSITIVE, torch.zeros(2, 2, 2))
    h[:, 0] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    h.requires_grad_()
    loss, scores = info_nce(q, p, h, temperature=1.0, positive_ids=positive_ids,
                            negative_ids=torch.tensor([[3, -1], [4, -1]]))
    assert loss.item() == pytest.approx(info_nce(q, p, h[:, :1], temperature=1.0)[0].item())
    loss.backward()
    assert torch.isfinite(h.grad).all() and (h.grad[:, 1] == 0).all()
    assert (scores[:, 1] == 0).all()


def test_masking_equals_leaving_the_candidate_out():
    q, p, h = random_batch(b=4, n=2)
    negative_ids = torch.tensor([[20, 21], [11, 22], [23, 12], [24, 25]])
    loss, _ = info_nce(q, p, h, temperature=0.2, query_ids=torch.tensor([1, 2, 1, 3]),
                       positive_ids=torch.tensor([10, 11, 12, 11]), negative_ids=negative_ids)
    cos = F.cosine_similarity(q[:, None], torch.cat([p, h.reshape(8, 6)])[None], dim=-1) / 0.2
    # candidates 0..3 are the positives; 4 + 2 i + k is negative k of query i
    out = {0: [2], 1: [3, 6], 2: [0, 9], 3: [1, 6]}
    want = [softmax_loss(float(cos[i, i]), *(float(cos[i, m]) for m in range(12)
                                             if m != i and m not in out[i])) for i in range(4)]
    assert loss.item() == pytest.approx(sum(want) / 4, abs=1e-5)


def test_stats_by_hand():
    negatives = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    *_, stats = info_nce(QUERY, POSITIVE, negatives, temperature=1.0, return_stats=True)
    # query 1: own 1, best other 0.6; query 2: own 0.8, best other 1
    assert stats["accuracy@1"] == 0.5
    assert stats["positive"] == pytest.approx((1 + 0.8) / 2)
    assert stats["hardest_negative"] == pytest.approx((0.6 + 1) / 2)
    *_, stats = info_nce(QUERY, POSITIVE, negatives, temperature=1.0, return_stats=True,
                         negative_ids=torch.tensor([[-1], [-1]]))
    assert stats["accuracy@1"] == 1.0
    assert stats["hardest_negative"] == pytest.approx((0.6 + 0) / 2)


def test_gradients_agree_with_finite_differences():
    batch = [x.requires_grad_() for x in random_batch()]
    ids = {"positive_ids": torch.tensor([1, 2, 1, 3, 4])}
    loss, _ = info_nce(*batch, temperature=0.5, **ids)
    grads = torch.autograd.grad(loss, batch)
    for i, (x, grad) in enumerate(zip(batch, grads)):
        direction = torch.randn_like(x)

        def f(x):
            return info_nce(*batch[:i], x, *batch[i + 1:], temperature=0.5, **ids)[0]
        with torch.no_grad():
            assert slope(f, x, direction) == pytest.approx(float((grad * direction).sum()),
                                                           abs=2e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_embeddings_are_scored_in_float32(autocast):
    batch = [x.bfloat16() for x in random_batch()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, scores = info_nce(*batch, temperature=0.05)
    want, _ = info_nce(*(x.float() for x in batch), temperature=0.05)
    assert loss.dtype == scores.dtype == torch.float32 and torch.equal(loss, want)


@pytest.mark.parametrize("change, text", [
    ({"temperature": 0.0}, "temperature"), ({"temperature": -1.0}, "-1"),
    ({"temperature": math.nan}, "nan"), ({"positive": torch.ones(2, 3)}, r"\(2, 3\)"),
    ({"query": torch.ones(2), "positive": torch.ones(2)}, r"\(2,\)"),
    ({"negatives": torch.ones(2, 2)}, "negatives"),
    ({"negatives": torch.ones(3, 1, 2)}, r"\(3, 1, 2\)"),
    ({"negatives": torch.ones(2, 1, 3)}, r"\(2, 1, 3\)"),
])
def test_what_info_nce_refuses(change, text):
    with pytest.raises(ValueError, match=text):
        info_nce(**{"query": QUERY, "positive": POSITIVE, "temperature": 0.05, **change})


# ---------------------------------------------------------------- CoSENT, Eq. (2)

def double_loop(cosine, score, temperature):
    """The formula as it is printed."""
    terms = [torch.zeros(())]
    for i in range(len(score)):
        for j in range(len(score)):
            if score[i] > score[j]:
                terms.append((cosine[j] - cosine[i]) / temperature)
    return torch.logsumexp(torch.stack(terms), dim=0)


def test_cosent_by_hand():
    loss = cosent_loss(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([5, 1, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.8) + math.exp(-0.4)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels, temperature", [(2, 0.05), (6, 0.05), (1000, 0.05), (6, 1.0)])
def test_cosent_equals_the_double_loop_with_ties(seed, levels, temperature):
    generator = torch.Generator().manual_seed(seed)
    cosine = (torch.rand(30, generator=generator) * 2 - 1).requires_grad_()
    score = torch.randint(0, levels, (30,), generator=generator).float() / 3
    got = cosent_loss(cosine, score, temperature=temperature)
    want = double_loop(cosine, score, temperature)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got, want = (torch.autograd.grad(x, cosine)[0] for x in (got, want))
    assert torch.allclose(got, want, atol=2e-5 / temperature)


def test_cosent_sees_the_order_of_the_scores_only():
    cosine, score = torch.rand(20), torch.randint(0, 5, (20,)).double()
    shuffle = torch.randperm(20)
    for other in (score * 100 - 7, score.exp(), score.long()):
        assert cosent_loss(cosine, other, temperature=0.05) == cosent_loss(cosine, score,
                                                                           temperature=0.05)
    assert torch.allclose(cosent_loss(cosine[shuffle], score[shuffle], temperature=0.05),
                          cosent_loss(cosine, score, temperature=0.05))


@pytest.mark.parametrize("score", [torch.ones(4), torch.ones(1)])
def test_equal_scores_give_nothing_and_a_finite_gradient(score):
    cosine = torch.rand(len(score)).requires_grad_()
    loss = cosent_loss(cosine, score, temperature=0.05)
    loss.backward()
    assert loss == 0 and torch.equal(cosine.grad, torch.zeros(len(score)))


def test_cosent_is_fast_and_finite_for_a_large_batch():
    cosine = torch.linspace(1, -1, 20_000).requires_grad_()                 # all of them wrong
    began = time.perf_counter()
    loss = cosent_loss(cosine, torch.arange(20_000), temperature=0.001)
    loss.backward()
    assert time.perf_counter() - began < 2.0                # the double loop takes minutes
    assert 1990 < loss.item() < 2030 and torch.isfinite(cosine.grad).all()


@pytest.mark.parametrize("cosine, score, temperature, text", [
    ([0.1, 0.2], [1.0], 0.05, r"\(2,\)"), ([[0.1]], [[1.0]], 0.05, r"\(1, 1\)"),
    ([0.1, 0.2], [1.0, math.nan], 0.05, "finite"), ([0.1, 0.2], [1.0, math.inf], 0.05, "finite"),
    ([0.1, 0.2], [1.0, 0.0], 0.0, "temperature"),
])
def test_what_cosent_refuses(cosine, score, temperature, text):
    with pytest.raises(ValueError, match=text):
        cosent_loss(torch.tensor(cosine), torch.tensor(score), temperature=temperature)


# ---------------------------------------------------------------- Matryoshka

def dot(a, b):
    return (a * b).sum(-1).mean()


def test_matryoshka_by_hand():
    a, b = torch.tensor([[3.0, 4.0, 12.0]]), torch.tensor([[-2.0, 0.0, 0.0]])
    # prefixes, renormalised: -1; (3, 4) / 5 -> -3/5; (3, 4, 12) / 13 -> -3/13
    assert matryoshka(dot, (a, b), [1, 2, 3]).item() == pytest.approx((-1 - 3 / 5 - 3 / 13) / 3)
    assert matryoshka(dot, (a, b), [2]).item() == pytest.approx(-3 / 5)
    got = matryoshka(dot, (a, b), [1, 3], weights=[3.0, 1.0])
    assert got.item() == pytest.approx((3 * -1 + 1 * -3 / 13) / 4)
    assert matryoshka(dot, (a, b), [3, 1], weights=[1.0, 3.0]).item() == pytest.approx(got.item())


def test_matryoshka_hands_the_full_widths_scores_through():
    q, p, h = random_batch()
    nce = partial(info_nce, temperature=0.1, return_stats=True)
    loss, scores, stats = matryoshka(nce, (q, p, h), [2, 4, 6])
    each = [nce(*(x[..., :d] for x in (q, p, h))) for d in (2, 4, 6)]
    assert loss.item() == pytest.approx(sum(x[0].item() for x in each) / 3, rel=1e-5)
    assert torch.allclose(scores, each[2][1], atol=1e-6)
    assert stats == pytest.approx(each[2][2])
    assert torch.equal(matryoshka(nce, (q, p, h), [6, 2, 4])[1], scores)    # in any order
    loss, scores = matryoshka(partial(info_nce, temperature=0.1), (q, p, None), [2, 6])
    assert scores.shape == (5, 0)


@pytest.mark.parametrize("dims, weights, text", [
    ([], None, "dims"), ([0, 2], None, "dims"), ([2, 7], None, "7"), ([2, 4], [1.0], "1 weights"),
])
def test_what_matryoshka_refuses(dims, weights, text):
    q, p, _ = random_batch()
    with pytest.raises(ValueError, match=text):
        matryoshka(dot, (q, p), dims, weights)


# ---------------------------------------------------------------- the two-pass step

def small_encoder():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))


def contrastive(x):
    """6 queries, 6 positives, 2 negatives each, at two widths."""
    q, p, h = x.split([6, 6, 12])
    return matryoshka(partial(info_nce, temperature=0.1, positive_ids=torch.tensor([0, 1, 2, 3, 1,
                                                                                    4])),
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
        got, same = cached_backward(chunked, inputs.split(sizes), contrastive)
    close = 0.02 if autocast else 2e-6
    assert got.item() == pytest.approx(loss.item(), rel=close) and not got.requires_grad
    assert torch.allclose(same, scores, atol=close)
    for a, b in zip(chunked.parameters(), whole.parameters()):
        assert relative(a.grad, b.grad) < close


def test_the_two_pass_gradient_is_the_full_batchs_and_not_the_chunks_mean():
    inputs, chunked, apart = torch.randn(8, 7), small_encoder(), small_encoder()

    def loss_fn(x):
        return info_nce(*x.chunk(2), temperature=0.1)[0]
    cached_backward(chunked, inputs.split(2), loss_fn)
    for chunk in inputs.view(2, 4, 7).transpose(0, 1):      # a query and its positive at a time
        (loss_fn(apart(chunk)) / 4).backward()
    assert relative(apart[0].weight.grad, chunked[0].weight.grad) > 0.5


def test_scale_and_return_values():
    inputs, encoder = torch.randn(24, 7), small_encoder()
    for sizes in ([24], [9, 15]):
        grads = []
        for scale in (1.0, 0.25):
            encoder.zero_grad()
            out = cached_backward(encoder, inputs.split(sizes), lambda x: x.square().sum(),
                                  scale=scale)
            assert len(out) == 1 and out[0].item() == pytest.approx(
                encoder(inputs).square().sum().item(), rel=1e-5)     # the loss is not scaled
            grads.append(encoder[0].weight.grad.clone())
        assert torch.allclose(grads[1], grads[0] / 4)


@pytest.mark.parametrize("sizes, opened, passes", [([24], 0, 1), ([12, 12], 1, 4),
                                                   ([6] * 4, 3, 8)], ids=str)
def test_all_chunks_but_the_last_run_without_synchronisation(sizes, opened, passes):
    encoder, log = small_encoder(), []

    @contextlib.contextmanager
    def no_sync():
        log.append("open")
        yield
        log.append("close")

    def encode(chunk):
        log.append("encode")
        return encoder(chunk)

    cached_backward(encode, torch.randn(24, 7).split(sizes), contrastive, no_sync)
    n = len(sizes)
    first = ["encode"] * n if n > 1 else []
    assert log == first + ["open", "encode", "close"] * (n - 1) + ["encode"]
    assert (log.count("open"), log.count("encode")) == (opened, passes)


# ---------------------------------------------------------------- LM cross-entropy in chunks

def lm_batch(s=37, d=8, v=29, dtype=torch.float32):
    hidden = torch.randn(s, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).requires_grad_()
    targets = torch.randint(0, v, (s,))
    targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1024])
def test_chunks_equal_cross_entropy(chunk):
    hidden, weight, targets = lm_batch()
    got = lm_cross_entropy(hidden, weight, targets, chunk)
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(3 * got, (hidden, weight)),
                    torch.autograd.grad(3 * want, (hidden, weight))):
        assert torch.allclose(a, b, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = lm_batch()
    got = lm_cross_entropy(hidden * 1000, weight, targets, 8)
    want = F.cross_entropy(hidden * 1000 @ weight.T, targets)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_nothing_to_predict_is_zero_and_not_nan():
    hidden, weight, targets = lm_batch()
    loss = lm_cross_entropy(hidden, weight, torch.full_like(targets, -100), 8)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_hidden_states(autocast):
    hidden, weight, targets = lm_batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = lm_cross_entropy(hidden, weight, targets, 10)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [loss.dtype, *(g.dtype for g in grads)] == [torch.float32, torch.bfloat16, torch.float32]
    exact = hidden.detach().float().requires_grad_()
    want = F.cross_entropy(exact @ weight.T, targets)
    assert loss.item() == pytest.approx(want.item(), rel=0.01)
    for a, b in zip(grads, torch.autograd.grad(want, (exact, weight))):
        assert relative(a.float(), b) < 0.02


@pytest.mark.parametrize("wrong", [-1, 29])
def test_a_target_outside_the_vocabulary_is_not_silently_another_one(wrong):
    hidden, weight, targets = lm_batch()
    targets[3] = wrong
    with pytest.raises((RuntimeError, IndexError)):
        lm_cross_entropy(hidden, weight, targets)


def test_examples_in_the_docstrings():
    result = doctest.testmod(losses)
    assert result.attempted >= 1 and result.failed == 0
