"""Measures that can see a mask; each takes an encoder and returns a number.

Finding a document by its summary line is nearly blind to what attention may see. So here are:
order_triplets   the right one of two documents whose first lines differ in word order only
number_gap       "3 fairy tales": the passage with the same number, or another (Limitations)
long_passages    a sentence of the first, or of the last, third of a long document -> the document
lm_loss          what stage 3 left of the language model
parts_of_questions  a translated question, its English words, its others: what is understood?
attention_ranks  the rank of M, and the effective rank of the attention made of it (Sec. 3.2)
attention_to_later  the share of attention that a mask lets through to later tokens
embedding_rank   the effective rank of embeddings, near 1 if they have collapsed (Sec. 4.6.2)

UNSPECIFIED: the paper shows one example of numbers and no score; the sentences are ours.
"""
import itertools
import math
import re
from collections import defaultdict

import numpy as np
import torch

from engine.collection import Collection, document_text
from eval import retrieval
from mask import CAUSAL, effective_rank, mask_rank, soft_mask
from toy.lexicon import LexiconTranslator, join

SWAP = re.compile(r"(?<= )([a-z]{3,}) ((?:to|from|of|into|by|with|for|in|before|after|than) "
                  r"(?:an? |the )?)([a-z]{3,})\b")
NOT_SWAPPED = set("the and for with from this that its all not any are has which into than".split())
SUBJECTS = {                       # what a query asks for, and the passage about it
    "fairy tales": "A picture book for children with {} fairy tales and coloured drawings.",
    "days in the mountains": "They walked from hut to hut and spent {} days in the mountains.",
    "dimensions of an array": "The function returns the {} dimensions of an array as a tuple.",
    "threads at a time": "By default the pool of workers runs {} threads at a time."}
LONG = 1500                        # characters of a long document at least
RANK_TOKENS = 32                   # of the texts whose attention is looked at


# ---------------------------------------------------------------- triplets

def swapped(line):
    """Return a line with the words around its first preposition exchanged, None without any.

    >>> swapped("Convert a string to bytes."), swapped("Return it.")
    ('Convert a bytes to string.', None)
    """
    for match in SWAP.finditer(line):
        left, middle, right = match.groups()
        if left != right and not {left, right} & NOT_SWAPPED:
            return f"{line[:match.start()]}{right} {middle}{left}{line[match.end():]}"
    return None


def order_triplets(collection):
    """Return [(query, right document, wrong document)] of a collection's questions.

    A document is the line and then its body. Each pair is asked for both ways, so an encoder that
    ignores word order, or always likes one of the two documents, scores 0.5.
    """
    bodies, triplets = {row["id"]: document_text(row) for row in collection.corpus}, []
    for row in collection.queries:
        line, other = row["text"], swapped(row["text"])
        if other:
            judged = collection.qrels[row["id"]]
            body = bodies[max(judged, key=judged.get)]
            documents = f"{line}\n\n{body}", f"{other}\n\n{body}"
            triplets += [(line, *documents), (other, *documents[::-1])]
    return triplets


def cosines(encoder, triplets):
    """Return the cosines of each query with its right and its wrong text, two arrays (N,)."""
    if not triplets:
        raise ValueError("no question of dev has two words to swap, so word order has no score")
    queries, right, wrong = (list(texts) for texts in zip(*triplets))
    q = encoder.encode(queries, prompt=encoder.prompts["retrieval"])
    return [(q * encoder.encode(side)).sum(1) for side in (right, wrong)]


def preference(encoder, triplets):
    """Return the share of triplets whose right text is nearer; a tie to 1e-6 counts half."""
    right, wrong = cosines(encoder, triplets)
    return float(np.where(np.abs(right - wrong) < 1e-6, 0.5, right > wrong).mean())


def number_gap(encoder):
    """Return the mean of cos(q, same number) - cos(q, other number); 0: numbers are ignored."""
    triplets = [(f"{right} {subject}", passage.format(right), passage.format(wrong))
                for subject, passage in SUBJECTS.items()
                for right, wrong in itertools.permutations(range(2, 10), 2)]
    right, wrong = cosines(encoder, triplets)
    return float((right - wrong).mean())


# ---------------------------------------------------------------- translated questions

def parts_of_questions(collection):
    """Return {part: Collection} of the questions of clr_test in 25 languages.

    The dictionary leaves words that it does not have in English. Only questions with both kinds of
    words are taken, so the parts have the same ones.
    """
    translate, queries = LexiconTranslator(), defaultdict(list)
    english = {row["id"].rpartition("/")[0]: row["text"] for row in collection.queries
               if row["lang"] == "en"}
    for row in collection.queries:
        text, lang = english[row["id"].rpartition("/")[0]], row["lang"]
        words, same = translate.words(text, lang), translate.words(text, "en")
        parts = {"whole": row["text"],
                 "untranslated words": join([word for word, known in words if not known], lang),
                 "translated words": join([word for word, known in words if known], lang),
                 "these in English": join([word for word, known in same if known], "en")}
        if lang != "en" and all(parts.values()):
            for name, part in parts.items():
                queries[name].append({**row, "text": part})
    return {name: Collection(collection.corpus, own, collection.qrels)
            for name, own in queries.items()}


# ---------------------------------------------------------------- long passages

def long_passages(encoder, collection, third, max_len=512):
    """Return nDCG@10 of finding long documents by a sentence of their third number 0, 1 or 2.

    The sentence stays in the document. Texts are read up to `max_len` tokens, or up to the model's
    block_size, and thirds are of what is read; training read less.
    """
    corpus, queries, tokenizer = [], [], encoder.tokenizer
    most = min(max_len, encoder.model.config.block_size)
    for row in collection.corpus:
        text = document_text(row)
        if len(text) < LONG:
            continue
        text = tokenizer.decode(tokenizer.encode(text)[:most - 1])      # the end takes one
        part = text[third * len(text) // 3:(third + 1) * len(text) // 3]
        sentences = [s.strip() for s in re.split(r"(?<=[.:])\s|\n\s*\n", part)[1:-1]]
        sentences = [s for s in sentences if 40 <= len(s) <= 200]
        if sentences:
            corpus.append({"id": row["id"], "text": text})
            queries.append({"id": row["id"], "text": sentences[len(sentences) // 2]})
    if not queries:
        raise ValueError(f"no document of {LONG} characters has a sentence to ask with")
    before, qrels = encoder.max_len, {query["id"]: {query["id"]: 1} for query in queries}
    encoder.max_len = most
    try:
        return retrieval(encoder, Collection(corpus, queries, qrels))["ndcg@10"]
    finally:
        encoder.max_len = before


# ---------------------------------------------------------------- the model itself

@torch.no_grad()
def lm_loss(embedder, texts, n_texts=200, length=128):
    """Return the next-token loss of a model under the causal mask, in nats a token."""
    ids = [x[:length] for x in embedder.tokenizer.encode_batch(texts[:n_texts]) if len(x) > 1]
    inputs, targets = (torch.tensor([i for x in side for i in x], device=embedder.device)
                       for side in (ids, [[*x[1:], -100] for x in ids]))
    return float(embedder.model(inputs, [len(x) for x in ids], CAUSAL, targets))


def embedding_rank(encoder, texts, n_texts=500):
    """Return the effective rank of the embeddings of some texts, at most their width."""
    return effective_rank(torch.from_numpy(encoder.encode(texts[:n_texts])))


@torch.no_grad()
def attention_maps(embedder, texts, mask, n=RANK_TOKENS):
    """Return the attention of texts of n tokens, float64 (maps, n, n): of each text, layer, head.

    It is softmax(q k^T / sqrt(E) + log M), or x M, with the q and k that the model hands to its
    attention.
    """
    ops, maps = embedder.model.layers[0].self_attn.ops, []             # one for all layers
    m, attention = soft_mask(n, mask.alpha, mask.axis), ops.attention

    def look(q, k, v, texts):                      # q (n, H, E), k (n, K, E)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
        logits = torch.einsum("ihe,jhe->hij", q.double(), keys).cpu() / math.sqrt(q.shape[2])
        maps.append((logits * m if mask.apply == "logits" else logits + m.log()).softmax(-1))
        return attention(q, k, v, texts)

    ops.attention = look
    try:
        for ids in embedder.tokenizer.encode_batch(texts):
            if len(ids) >= n:
                embedder.model(torch.tensor(ids[:n], device=embedder.device), [n], mask)
    finally:
        ops.attention = attention
    return torch.cat(maps)


def attention_ranks(embedder, texts, mask, n=RANK_TOKENS):
    """Return (rank of M, its effective rank, the mean effective rank of the attention)."""
    m = soft_mask(n, mask.alpha, mask.axis)
    ranks = [effective_rank(attention) for attention in attention_maps(embedder, texts, mask, n)]
    return mask_rank(m), effective_rank(m), float(np.mean(ranks))


def attention_to_later(embedder, texts, mask, n=RANK_TOKENS):
    """Return the mean share of a token's attention that later tokens get."""
    return float(attention_maps(embedder, texts, mask, n).triu(1).sum(-1).mean())
