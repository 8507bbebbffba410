"""Ask a trained model natural questions, written by hand in ten languages (PAPER Sec. 3.3).

    python -m experiments.questions --checkpoint=out/embed_sup

Each question names the functions of the installed documentation that answer it. Reported: how often
one of them is among the first ten of some 40,000 documents, by language, beside BM25. The paper's
counterpart is MKQA, Table 3. The questions are never looked at while a recipe is chosen.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import load_config
from embed import Embedder, load_index
from engine.bm25 import BM25
from engine.jsonl import read_jsonl
from experiments.results import markdown, write_result

QUESTIONS = Path(__file__).parent.parent / "tests" / "data" / "natural_questions.jsonl"


@dataclass(frozen=True)
class QuestionsConfig:
    """The settings of `python -m experiments.questions`."""
    checkpoint: str = "out/embed_sup"          # folder of train.py
    corpus: str = "out/installed_docs/search"  # folder with corpus.jsonl
    results: str = "results"
    k: int = 10                                # how many results count


def accuracy_by_language(questions, ranking, names):
    """Return {language: share of its questions with an expected name in the ranking}, and "mean".

    ranking: (Q, k) document numbers; names: the documents' ids.
    """
    hits = defaultdict(list)
    for question, ranks in zip(questions, ranking):
        hits[question["lang"]].append(bool({names[i] for i in ranks} & set(question["expected"])))
    shares = {lang: float(np.mean(own)) for lang, own in hits.items()}
    return {**shares, "mean": float(np.mean(list(shares.values())))}


def main(argv=None):
    """Rank the documents for every question, print the table, write results/questions.json."""
    cfg = load_config(QuestionsConfig, argv)
    questions = list(read_jsonl(QUESTIONS, {"lang": str, "query": str, "expected": list}))
    texts = [question["query"] for question in questions]
    embedder = Embedder(cfg.checkpoint)
    documents, vectors = load_index(embedder, cfg.corpus)
    names = [row["id"] for row in documents]
    scores = embedder.encode(texts, prompt=embedder.prompts["retrieval"]) @ vectors.T   # (Q, N)
    ours = np.argsort(-scores, axis=1)[:, :cfg.k]
    lexical = BM25([f"{row['id']} {row['text']}" for row in documents]).top_k(texts, cfg.k)[0]
    rows = [{f"top-{cfg.k} accuracy": label, **accuracy_by_language(questions, ranking, names)}
            for label, ranking in (("BM25", lexical), ("nanoConan", ours))]
    print("\n".join(markdown(rows)))
    return write_result(cfg.results, "questions", {
        "title": f"{len(questions)} natural questions", "tables": {"": rows},
        "command": f"python -m experiments.questions --checkpoint={cfg.checkpoint}"})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.questions: error: {error}")
