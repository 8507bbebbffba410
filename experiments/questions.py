"""Ask a trained model 100 questions that people wrote by hand in ten languages (PAPER Sec. 3.3).

    python -m experiments.questions --checkpoint=out/embed_sup --out=results/questions.json

Natural sentences, not put through the lexicon; each names the functions of the installed
documentation that answer it. Reported: how often one of them is among the first ten of some 40,000
documents, by language, beside BM25 (the paper's counterpart is MKQA, Table 3).
"""
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.bm25 import BM25
from configurator import load_config
from data import PROMPTS, read_jsonl
from embed import Embedder, load_index

QUESTIONS = Path(__file__).parent.parent / "tests" / "data" / "natural_questions.jsonl"


@dataclass(frozen=True)
class QuestionsConfig:
    """The settings of `python -m experiments.questions`."""
    checkpoint: str = "out/embed_sup"          # folder of train.py
    corpus: str = "out/installed_docs/search"  # folder with corpus.jsonl
    out: str = ""                              # JSON file to write
    k: int = 10                                # how many results count


def accuracy_by_language(questions, ranked, names):
    """Return {language: share of its questions with an expected name among the ranked}, and "mean".

    ranked: (Q, k) document numbers, names: the documents' ids.
    """
    hits = defaultdict(list)
    for question, row in zip(questions, ranked):
        hits[question["lang"]].append(bool({names[i] for i in row} & set(question["expected"])))
    shares = {lang: float(np.mean(found)) for lang, found in hits.items()}
    return {**shares, "mean": float(np.mean(list(shares.values())))}


def main(argv=None):
    """Rank the documents for every question, print and write the shares."""
    cfg = load_config(QuestionsConfig, argv)
    questions = list(read_jsonl(QUESTIONS, {"lang": str, "query": str, "expected": list}))
    texts = [question["query"] for question in questions]
    embedder = Embedder(cfg.checkpoint)
    rows, vectors = load_index(embedder, cfg.corpus)
    names = [row["id"] for row in rows]
    scores = embedder.encode(texts, prompt=PROMPTS["retrieval"]) @ vectors.T    # (Q, N)
    lexical = BM25([f"{row['id']} {row['text']}" for row in rows]).top_k(texts, cfg.k)[0]
    result = {"model": accuracy_by_language(questions, np.argsort(-scores, axis=1)[:, :cfg.k],
                                            names),
              "bm25": accuracy_by_language(questions, lexical, names)}
    for label, shares in result.items():
        print(f"{label:<6} top-{cfg.k} accuracy: " + "  ".join(f"{lang} {share:.2f}"
                                                               for lang, share in shares.items()))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
