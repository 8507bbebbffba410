"""InfoNCE, CoSENT and Matryoshka: by hand and by brute force."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from losses import cosent_loss, info_nce, matryoshka
from tiny import nce

# two queries along the axes; p1 lies on q1, p2 is at cosine 0.6 to q1 and 0.8 to q2
QUERY = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
POSITIVE = torch.tensor([[1.0, 0.0], [0.6, 0.8]])


def softmax_loss(own, *others):
    """-log(e^own / (e^own + sum of e^others)), with plain floats."""
    return math.log(sum(math.exp(x) for x in (own, *others))) - own


def random_batch(b=5, n=3, d=6):
    return torch.randn(b, d), torch.randn(b, d), torch.randn(b, n, d)


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


def test_floor_without_a_temperature():
    """64 candidates at T = 1: even a perfect model is left with log(1 + 63 e^-2) = 2.25."""
    one = torch.ones(1, 1)
    loss, _ = info_nce(one, one, -torch.ones(1, 63, 1), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 63 * math.exp(-2)), abs=1e-6)
    assert loss.item() == pytest.approx(2.25, abs=0.005)
    assert info_nce(one, one, -torch.ones(1, 63, 1), temperature=0.05)[0] < 1e-6


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
    loss, _ = nce(QUERY, POSITIVE, temperature=1.0, positive_ids=ids)
    assert loss == 0                                        # nothing else is left
    loss, _ = nce(QUERY, POSITIVE, temperature=1.0, positive_ids=torch.tensor([7, 8]))
    assert loss > 0.3


def test_a_negative_equal_to_a_positive_counts_for_the_others_only():
    negatives = torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]])
    loss, _ = nce(QUERY, POSITIVE, negatives, temperature=1.0,
                  positive_ids=torch.tensor([1, 2]), negative_ids=torch.tensor([[2], [3]]))
    one = softmax_loss(1.0, 0.6, 0.0, -1.0)                 # 2 is a negative for query 1 ...
    two = softmax_loss(0.8, 0.0, 0.0)                       # ... and not for query 2
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-6)


@pytest.mark.parametrize("ids", [{}, {"positive_ids": torch.tensor([1, 2])}])
def test_an_empty_place_is_not_there(ids):
    q, p, h = (QUERY.clone().requires_grad_(), POSITIVE, torch.zeros(2, 2, 2))
    h[:, 0] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    h.requires_grad_()
    loss, scores = nce(q, p, h, temperature=1.0,
                       negative_ids=torch.tensor([[3, -1], [4, -1]]), **ids)
    assert loss.item() == pytest.approx(info_nce(q, p, h[:, :1], temperature=1.0)[0].item())
    loss.backward()
    assert torch.isfinite(h.grad).all() and (h.grad[:, 1] == 0).all()
    assert (scores[:, 1] == 0).all()


def test_masking_equals_leaving_the_candidate_out():
    q, p, h = random_batch(b=4, n=2)
    negative_ids = torch.tensor([[20, 21], [11, 22], [23, 12], [24, 25]])
    loss, _ = nce(q, p, h, temperature=0.2, query_ids=torch.tensor([1, 2, 1, 3]),
                  positive_ids=torch.tensor([10, 11, 12, 11]), negative_ids=negative_ids)
    cos = F.cosine_similarity(q[:, None], torch.cat([p, h.reshape(8, 6)])[None], dim=-1) / 0.2
    # candidates 0..3 are the positives; 4 + 2 i + k is negative k of query i
    out = {0: [2, 9], 1: [3, 6], 2: [0, 9], 3: [1, 6]}    # 9 is an answer of query 0's twin
    want = [softmax_loss(float(cos[i, i]), *(float(cos[i, m]) for m in range(12)
                                             if m != i and m not in out[i])) for i in range(4)]
    assert loss.item() == pytest.approx(sum(want) / 4, abs=1e-5)


def test_no_known_positive_of_a_query_counts_against_it():
    """Query 1 has the positives 1 and 2, of which 1 was drawn; 3 is drawn for query 2."""
    negatives = torch.tensor([[[0.0, 1.0], [0.8, 0.6]], [[-1.0, 0.0], [0.0, 0.0]]])
    ids = {"positive_ids": torch.tensor([1, 3]), "negative_ids": torch.tensor([[5, 3], [2, -1]]),
           "known_ids": torch.tensor([[1, 2], [3, -1]])}
    loss, _ = nce(QUERY, POSITIVE, negatives, temperature=1.0, **ids)
    one = softmax_loss(1.0, 0.6, 0.0, 0.8)         # 2 is a hard negative of query 2 alone
    two = softmax_loss(0.8, 0.0, 1.0, 0.0)         # not 3, the second negative of query 1
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-6)
    # in the batch: what was drawn for query 2 is known to query 1 as well
    ids["known_ids"] = torch.tensor([[1, 3], [3, -1]])
    loss, _ = nce(QUERY, POSITIVE, negatives, temperature=1.0, **ids)
    one = softmax_loss(1.0, 0.0, -1.0)             # neither 3 in the batch nor 3 as a negative
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-6)


def test_gradients_agree_with_finite_differences():
    batch = [x.requires_grad_() for x in random_batch()]
    ids = {"positive_ids": torch.tensor([1, 2, 1, 3, 4])}
    loss, _ = nce(*batch, temperature=0.5, **ids)
    grads = torch.autograd.grad(loss, batch)
    for i, (x, grad) in enumerate(zip(batch, grads)):
        direction = torch.randn_like(x)

        def f(x):
            return nce(*batch[:i], x, *batch[i + 1:], temperature=0.5, **ids)[0]
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
    ({"temperature": 0.0}, "temperature must be positive, not 0"),
    ({"temperature": math.nan}, "nan"), ({"positive": torch.ones(2, 3)}, r"\(2, 3\)"),
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


@pytest.mark.parametrize("score", [torch.ones(4), torch.ones(1)])
def test_equal_scores_give_nothing_and_a_finite_gradient(score):
    cosine = torch.rand(len(score)).requires_grad_()
    loss = cosent_loss(cosine, score, temperature=0.05)
    loss.backward()
    assert loss == 0 and torch.equal(cosine.grad, torch.zeros(len(score)))


def test_cosent_is_finite_where_everything_is_wrong():
    cosine = torch.linspace(1, -1, 200).requires_grad_()
    loss = cosent_loss(cosine, torch.arange(200), temperature=0.001)
    loss.backward()
    assert 1990 < loss.item() < 2030 and torch.isfinite(cosine.grad).all()


@pytest.mark.parametrize("cosine, score, temperature, text", [
    ([0.1, 0.2], [1.0], 0.05, r"\(2,\)"), ([0.1, 0.2], [1.0, 0.0], 0.0, "temperature"),
    ([[0.1, 0.2]], [[1.0, 0.0]], 0.05, r"\(1, 2\)"),
])
def test_what_cosent_refuses(cosine, score, temperature, text):
    with pytest.raises(ValueError, match=text):
        cosent_loss(torch.tensor(cosine), torch.tensor(score), temperature=temperature)


def test_cosent_compares_bfloat16_cosines_in_float32():
    cosine, score = torch.rand(20).bfloat16(), torch.randint(0, 5, (20,))
    want = cosent_loss(cosine.float(), score, temperature=0.05)
    assert cosent_loss(cosine, score, temperature=0.05).item() == want.item()


# ---------------------------------------------------------------- Matryoshka

def dot(a, b):
    return (a * b).sum(-1).mean(), a.shape[-1]


def test_matryoshka_by_hand():
    a, b = torch.tensor([[3.0, 4.0, 12.0]]), torch.tensor([[-2.0, 0.0, 0.0]])
    # prefixes, renormalised: -1; (3, 4) / 5 -> -3/5; (3, 4, 12) / 13 -> -3/13
    loss, width = matryoshka(dot, (a, b), [1, 2, 3])
    assert loss.item() == pytest.approx((-1 - 3 / 5 - 3 / 13) / 3) and width == 3
    loss, width = matryoshka(dot, (a, b), [2])
    assert loss.item() == pytest.approx(-3 / 5) and width == 2


def test_matryoshka_returns_the_scores_of_the_largest_dim():
    batch, nce = random_batch(), partial(info_nce, temperature=0.1)
    loss, scores = matryoshka(nce, batch, [2, 4, 6])
    each = [nce(*(x[..., :d] for x in batch)) for d in (2, 4, 6)]
    assert loss.item() == pytest.approx(sum(x[0].item() for x in each) / 3, rel=1e-5)
    assert torch.allclose(scores, each[2][1], atol=1e-6)
    assert torch.equal(matryoshka(nce, batch, [6, 2, 4])[1], scores)        # in any order


@pytest.mark.parametrize("dims, text", [([], "dims"), ([0, 2], "dims"), ([2, 7], "width 6")])
def test_what_matryoshka_refuses(dims, text):
    with pytest.raises(ValueError, match=text):
        matryoshka(dot, random_batch()[:2], dims)


def test_prefixes_of_bfloat16_are_normalised_in_float32():
    batch = [x.bfloat16() for x in random_batch()[:2]]
    want = matryoshka(dot, [x.float() for x in batch], [2, 6])[0]
    assert matryoshka(dot, batch, [2, 6])[0].item() == want.item()


def test_no_dim_exceeds_the_narrowest():
    with pytest.raises(ValueError, match="width 5"):
        matryoshka(dot, (torch.ones(1, 6), torch.ones(1, 5)), [6])
