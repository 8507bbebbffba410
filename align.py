"""Let tokens that translate each other start close: IBM model 1 over parallel sentences.

    python train.py config/real/embed_sup.py --root=FOLDER       # aligned_start = 10 in stage 1

A contrastive loss needs many visits to learn a word that a sentence shows it among twenty others;
expectation maximisation (Brown et al. 1993, model 1) needs a few passes of counting. What both
directions agree on mixes each token's random vector with those of its translations into English
and other languages, so that the untrained bag of words of `Conan.rank_scale` starts bilingual.
DEVIATES: not in the paper, which has trillions of tokens to learn this from (docs/log.md).
"""
import numpy as np
import torch


def model_1(pairs, vocab_size, rounds=5):
    """Return what meets what and how often they are each other's translation, best both ways.

    pairs: [(left ids, right ids)], each a sorted int64 array of distinct tokens of one sentence.
    Returns (left id, right id, t(right | left), t(left | right), expected count), arrays of one
    length: one entry for each two tokens that stand in at least one pair together.
    """
    sizes = [(len(left), len(right)) for left, right in pairs]
    left = np.concatenate([np.repeat(a, n) for (a, _), (_, n) in zip(pairs, sizes)])
    right = np.concatenate([np.tile(b, n) for (_, b), (n, _) in zip(pairs, sizes)])
    sentence = np.repeat(np.arange(len(pairs)), [a * b for a, b in sizes])
    kinds, where = np.unique(left * vocab_size + right, return_inverse=True)
    a, b = np.divmod(kinds, vocab_size)                # the two tokens of each kind of meeting

    def maximise(source, target):
        """A target token of a sentence has one source token there, which t shares out."""
        _, place = np.unique(sentence * vocab_size + target, return_inverse=True)
        t = np.ones(len(kinds))
        for _ in range(rounds):
            share = t[where]
            share /= np.bincount(place, share)[place]                       # E step
            count = np.bincount(where, share, minlength=len(kinds))
            t = count / np.bincount(source, count)[source]                  # M step
        return t, count

    forward, count = maximise(a, right)
    return a, b, forward, maximise(b, left)[0], count


def translation_matrix(bitext, vocab_size, least=0.01, smallest=500):
    """Return (V, V) sparse float32: row i holds what token i translates to, summing to 1.

    bitext: {(language, language): [(ids, ids)]}. Every language pair counts by itself, as one
    string means different things in two languages; pairs of fewer than `smallest` sentences show
    what stands together by accident. Entries whose two directions multiply to less than `least` are
    left out. English is what others are drawn to: its side gets no rows.
    """
    rows, columns, counts = [], [], []
    for (left, right), pairs in bitext.items():
        if len(pairs) < smallest:
            continue
        a, b, forward, backward, count = model_1(pairs, vocab_size)
        kept = forward * backward >= least
        for source, target, language in ((a, b, left), (b, a, right)):
            if language != "en":
                rows.append(source[kept])
                columns.append(target[kept])
                counts.append(count[kept])
    if not rows:
        return torch.zeros(vocab_size, vocab_size, layout=torch.sparse_coo)
    at = np.stack([np.concatenate(rows), np.concatenate(columns)])
    count = np.concatenate(counts)
    share = count / np.bincount(at[0], count, minlength=vocab_size)[at[0]]
    return torch.sparse_coo_tensor(at, share, (vocab_size, vocab_size), dtype=torch.float32,
                                   check_invariants=True).coalesce()


def aligned(vectors, matrix, weight, rounds=2):
    """Return (V, D) `vectors`, each mixed with those of its translations.

    weight: of the translations, the token's own vector having 1. Two rounds, as a token may reach
    English through a third language. Lengths, the IDF of `Conan.rank_scale`, stay or fall to the
    mean of the translations': a question word is rare where its language is, and no keyword there.
    """
    own = vectors.norm(dim=1, keepdim=True)
    mixed, length = vectors, own
    is_translated = torch.sparse.mm(matrix, torch.ones_like(own)) > 0
    for _ in range(rounds):
        mean = torch.sparse.mm(matrix, length)
        length = torch.where(is_translated, torch.minimum(own, mean), own)
        mixed = vectors + weight * torch.sparse.mm(matrix, mixed)
        mixed = mixed * (length / mixed.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return mixed
