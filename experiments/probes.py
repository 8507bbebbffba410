"""Measures that can see a mask, and Appendix B's numbers; each takes an encoder, returns a number.

Finding a document by its summary line is nearly blind to what attention may see. So here are:
order_triplets   the right one of two documents whose first lines differ in word order only
long_passages    a sentence of the first, or of the last, third of a long document -> the document
numbers          "3 fairy tales": the passage with the same number, or another (Limitations)
lm_loss          what stage 3 left of the language model
attention_ranks  the rank of M, and the effective rank of the attention made of it (Sec. 3.2)

UNSPECIFIED: the paper shows one example of numbers and no score; the sentences are ours.
"""
import math
import re
import tempfile
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from data import PROMPTS, document_text
from engine.jsonl import write_jsonl
from eval import evaluate
from mask import CAUSAL, effective_rank, mask_rank, soft_mask

SWAP = re.compile(r"(?<= )([a-z]{3,}) ((?:to|from|of|into|by|with|for|in|before|after|than) "
                  r"(?:an? |the )?)([a-z]{3,})\b")
NOT_SWAPPED = set("the and for with from this that its all not any are has which into than".split())
NUMBERS = tuple("23456789")
SUBJECTS = {                       # what a query asks for, and the passage about it
    "fairy tales": "A picture book for children with {} fairy tales and coloured drawings.",
    "chairs around a table": "The dining set comes as {} chairs around a table made of oak.",
    "days in the mountains": "They walked from hut to hut and spent {} days in the mountains.",
    "strings on a guitar": "The builder put {} strings on a guitar that he sold to a friend.",
    "dimensions of an array": "The function returns the {} dimensions of an array as a tuple.",
    "threads at a time": "By default the pool of workers runs {} threads at a time.",
}
LONG = 1500                        # characters of a long document at least
RANK_TOKENS = 32                   # of the texts whose attention is looked at


def write_collection(folder, corpus, queries, qrels):
    """Write corpus.jsonl, queries.jsonl and, last, qrels.tsv. qrels: {query: {document: gain}}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels.tsv").write_text("".join(
        f"{row['id']}\t{document}\t{gain:g}\n" for row in queries
        for document, gain in qrels[row["id"]].items()), encoding="utf-8")


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
            body = bodies[max(collection.qrels[row["id"]])]
            documents = f"{line}\n\n{body}", f"{other}\n\n{body}"
            triplets += [(line, *documents), (other, *documents[::-1])]
    return triplets


def number_triplets():
    """Return [(query, passage with its number, the same passage with another number)]."""
    return [(f"{right} {subject}", passage.format(right), passage.format(wrong))
            for subject, passage in SUBJECTS.items() for right, wrong in permutations(NUMBERS, 2)]


def cosines(encoder, triplets):
    """Return the cosines of each query with its right and its wrong text, two arrays (N,)."""
    queries, right, wrong = zip(*triplets)
    prompt = getattr(encoder, "prompts", PROMPTS)["retrieval"]
    q = encoder.encode(list(queries), prompt=prompt)
    return [(q * encoder.encode(list(side))).sum(1) for side in (right, wrong)]


def preference(encoder, triplets):
    """Return the share of triplets whose right text is nearer; a tie to 1e-6 counts half."""
    right, wrong = cosines(encoder, triplets)
    return float(np.where(np.abs(right - wrong) < 1e-6, 0.5, right > wrong).mean())


def number_gap(encoder):
    """Return the mean of cos(q, same number) - cos(q, other number); 0: numbers are ignored."""
    right, wrong = cosines(encoder, number_triplets())
    return float((right - wrong).mean())


# ---------------------------------------------------------------- long passages

def long_passages(encoder, collection, third, max_len=512):
    """Return nDCG@10 of finding long documents by a sentence of their third number 0, 1 or 2.

    The sentence stays in the document. Texts are read up to `max_len` tokens, or up to the model's
    block_size; training read fewer.
    """
    corpus, queries = [], []
    for row in collection.corpus:
        text = document_text(row)
        if len(text) < LONG:
            continue
        part = text[third * len(text) // 3:(third + 1) * len(text) // 3]
        sentences = [s.strip() for s in re.split(r"(?<=[.:])\s|\n\s*\n", part)[1:-1]]
        sentences = [s for s in sentences if 40 <= len(s) <= 200]
        if sentences:
            corpus.append({"id": row["id"], "text": text})
            queries.append({"id": row["id"], "text": sentences[len(sentences) // 2]})
    before = encoder.max_len
    encoder.max_len = min(max_len, encoder.model.config.block_size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "long"
            write_collection(path, corpus, queries, {q["id"]: {q["id"]: 1} for q in queries})
            scores = evaluate(encoder, "retrieval", path)
    finally:
        encoder.max_len = before
    return next(value for key, value in scores.items() if key.endswith("/ndcg@10"))


# ---------------------------------------------------------------- the model itself

@torch.no_grad()
def lm_loss(embedder, texts, n_texts=200, length=128):
    """Return the next-token loss of a model under the causal mask, in nats a token."""
    total = count = 0
    for ids in embedder.tokenizer.encode_batch(texts[:n_texts]):
        flat = torch.tensor(ids[:length], device=embedder.device)
        if len(flat) < 2:
            continue
        targets = torch.cat([flat[1:], flat.new_tensor([-100])])
        loss = embedder.model(flat, [len(flat)], CAUSAL, targets)
        total, count = total + float(loss) * (len(flat) - 1), count + len(flat) - 1
    return total / max(count, 1)


def embedding_rank(encoder, texts, n_texts=500):
    """Return the effective rank of texts' embeddings; near 1 they have collapsed (Sec. 4.6.2)."""
    return effective_rank(torch.from_numpy(encoder.encode(texts[:n_texts])))


@torch.no_grad()
def attention_ranks(embedder, texts, mask, n=RANK_TOKENS):
    """Return (rank of M, its effective rank, that of the attention) on texts of n tokens.

    The attention's is the mean over texts, layers and heads of the effective rank of
    softmax(q k^T / sqrt(E) + log M). It is formed here, from each layer's input and weights.
    """
    model, ranks = embedder.model, []
    config, weights = model.config, soft_mask(n, mask.alpha, mask.axis)
    e = config.n_embd // config.n_head
    frequency = config.rope_base ** -(torch.arange(0, e, 2).double() / e)
    angle = torch.arange(n).double()[:, None] * frequency                   # (n, E/2)
    cos, sin = (torch.cat([f, f], 1)[:, None] for f in (angle.cos(), angle.sin()))

    def rotated(x, weight):                        # (n, heads, E), float64
        x = (x @ weight.double().cpu().T).unflatten(1, (-1, e))
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def look(block, inputs):
        x = inputs[0].double().cpu()
        x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        x = x * block.input_layernorm.weight.double().cpu()
        q, k = (rotated(x, proj.weight) for proj in (block.self_attn.q_proj,
                                                     block.self_attn.k_proj))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(e) + weights.log()
        ranks.extend(effective_rank(p) for p in logits.softmax(-1))

    hooks = [block.register_forward_pre_hook(look) for block in model.layers]
    try:
        for ids in embedder.tokenizer.encode_batch(texts):
            if len(ids) >= n:
                model(torch.tensor(ids[:n], device=embedder.device), [n], mask)
    finally:
        for hook in hooks:
            hook.remove()
    return mask_rank(weights), effective_rank(weights), float(np.mean(ranks))
