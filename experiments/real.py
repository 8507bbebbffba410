"""Score a model trained on public sets beside BM25, a stock model and the bags of words.

    python -m tools.sets --root=FOLDER --out=out/real/sets
    python train.py config/real/embed_sup.py --data=out/real/sets
    python -m experiments.real --root=FOLDER --sentence_transformer=NAME

The sets that nothing was trained on: folders *_dev, held-out rows (tools/sets.py), rows of a split
for evaluation. One code scores all; what is in results/real.json is not scored again, except ours.
The headline is what CLR is for: questions in other languages, English passages (PAPER Sec. 3.3).
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import load_config
from embed import Embedder
from eval import LexicalBaseline, SentenceTransformerBaseline, evaluate
from experiments import baselines
from experiments.results import markdown, write_result
from tools import sets


@dataclass(frozen=True)
class RealConfig:
    """The settings of `python -m experiments.real`."""
    root: str = ""                         # folder of public sets
    data: str = "out/real/sets"            # what tools.sets made of it
    checkpoint: str = "out/real/embed_sup"
    sentence_transformer: str = ""         # a stock model: name or folder
    bags: bool = True                      # the bags of random vectors, plain and aligned
    max_len: int = 0                       # tokens read of a text; 0: the checkpoint's passage_len
    only: tuple[str, ...] = ()             # tasks: retrieval, bitext, sts, classification ...
    results: str = "results"


def jobs(root, data):
    """Return [(task, file or folder)] of what can be scored."""
    found = [("retrieval", path) for path in sets.held_out_collections(root)]
    for path in sorted(Path(data).glob("held_out/*/*.jsonl")):
        task = "pair_classification" if "label" in sets.columns_of(path) else "bitext"
        found.append((task, path))
    for path in sorted(Path(root).glob("*/data.jsonl*")):
        columns = sets.columns_of(path)
        if {"split", "score"} <= columns:
            found.append(("sts", path))
        elif {"text", "label", "split"} <= columns:
            found.append(("classification", path))
    return found


def headline(scores):
    """Return {row of the table: number} of one model's flat scores."""
    rows = {}
    cells = {key.split("/")[2]: value for key, value in scores.items()
             if key.startswith("retrieval/") and key.endswith("-en/ndcg@10")}
    foreign = [value for pair, value in cells.items() if pair != "en-en"]
    if foreign:
        rows["retrieval, other languages -> English, nDCG@10"] = sum(foreign) / len(foreign)
    rows |= {f"retrieval {pair}, nDCG@10": value for pair, value in cells.items()}
    metrics = {"bitext": "accuracy", "sts": "spearman", "classification": "accuracy",
               "pair_classification": "ap"}
    for key, value in scores.items():
        task, name, subset, metric = key.split("/")
        if metrics.get(task) == metric:
            rows[f"{task} {name} {subset}, {metric}"] = value
    return rows


def models(cfg):
    """Yield (label, encoder): ours first, then what it is compared with."""
    ours = Embedder(cfg.checkpoint)
    if not 0 <= cfg.max_len <= ours.model.config.block_size:
        raise ValueError(f"max_len {cfg.max_len} must lie in 0 .. {ours.model.config.block_size}")
    ours.max_len = cfg.max_len or ours.max_len
    yield "nanoConan", ours
    yield "BM25", LexicalBaseline()
    if cfg.sentence_transformer:
        yield Path(cfg.sentence_transformer).name, SentenceTransformerBaseline(
            cfg.sentence_transformer)
    if cfg.bags:
        for label, encoder in baselines.encoders(baselines.BaselinesConfig(data=cfg.data)):
            if isinstance(encoder, baselines.BagOfVectors):
                yield label, encoder


def main(argv=None):
    """Score every model on every set, print the table, write results/real.json."""
    cfg = load_config(RealConfig, argv)
    path = Path(cfg.results) / "real.json"
    scores = json.loads(path.read_text("utf-8"))["scores"] if path.is_file() else {}
    work = [(task, place) for task, place in jobs(cfg.root, cfg.data)
            if not cfg.only or task in cfg.only]
    if not work:
        raise ValueError(f"root {cfg.root!r}: no set to score")
    for label, model in models(cfg):
        if label in scores and label != "nanoConan":
            continue
        scores[label] = {}
        for task, place in work:
            if task == "retrieval" or not isinstance(model, LexicalBaseline):
                scores[label] |= evaluate(model, task, place)
                print(f"{label}: {task} {place}", flush=True)
    columns = {label: headline(own) for label, own in scores.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [{"": name, **{label: column.get(name) for label, column in columns.items()}}
            for name in names]
    print("\n".join(markdown(rows)))
    return write_result(cfg.results, "real", {
        "title": "Public sets, from random weights", "tables": {"": rows}, "scores": scores,
        "command": f"python -m experiments.real --root=FOLDER --checkpoint={cfg.checkpoint}"})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.real: error: {error}")
