"""Score a model trained on a folder of public sets beside BM25 and a stock model.

    python train.py config/real/embed_sup.py --root=FOLDER
    python -m experiments.real --root=FOLDER --sentence_transformer=NAME --out=results/real.json

The sets that nothing was trained on: folders *_dev, held-out rows (sets.py), rows of split "dev".
One code scores all three; baselines that are in --out already are not scored again. The paper's
counterparts are Tables 1 to 3 and 13; the headline is what CLR is for: questions in other languages
against English passages (PAPER Sec. 3.3).
"""
import json
from dataclasses import dataclass
from pathlib import Path

from tools import sets
import tasks
from configurator import load_config
from embed import Embedder
from eval import evaluate


@dataclass(frozen=True)
class RealConfig:
    """The settings of `python -m experiments.real`."""
    root: str = ""                         # folder of public sets
    checkpoint: str = "out/real/embed_sup"  # folder of train.py
    sentence_transformer: str = ""         # a stock model to compare with: name or folder
    bm25: bool = True                      # score BM25 as well, where it can be
    max_len: int = 0                       # tokens read of a text; 0: the checkpoint's passage_len
    only: tuple[str, ...] = ()             # tasks to score: retrieval, bitext, sts ...; empty: all
    out: str = ""                          # JSON file to write


def jobs(root, made):
    """Return [(task, file or folder)] of what can be scored: `made` is the folder of sets.py."""
    found = [("retrieval", path) for path in sets.held_out_collections(root)]
    for path in sorted(Path(made).glob("held_out/*/*.jsonl")):
        columns = sets.columns_of(path)
        task = "pair_classification" if "label" in columns else "bitext"
        found.append((task, path))
    for path in sorted(Path(root).glob("*/data.jsonl*")):
        columns = sets.columns_of(path)
        if "split" in columns and "score" in columns:
            found.append(("sts", path))
        elif {"text", "label", "split"} <= columns:
            found.append(("classification", path))
    return found


def headline(results):
    """Return {row of the table: number} of one model's flat results."""
    def mean(keys):
        values = [results[key] for key in keys if key in results]
        return sum(values) / len(values) if values else None

    rows = {}
    cells = {key.split("/")[2]: key for key in results
             if key.startswith("retrieval/") and key.endswith("/ndcg@10")}
    foreign = [pair for pair in cells if pair.endswith("-en") and pair != "en-en"]
    for pair in ("en-en", *foreign):
        rows[f"retrieval {pair}, nDCG@10"] = results.get(cells.get(pair))
    rows["retrieval, other languages to English, nDCG@10"] = mean(cells[p] for p in foreign)
    for name in dict.fromkeys(k.split("/")[1] for k in results if k.startswith("bitext/")):
        rows[f"bitext {name}, accuracy"] = mean(
            k for k in results if k.startswith(f"bitext/{name}/") and k.endswith("/accuracy")
            and "/mean/" not in k)
    for key, value in results.items():
        task, name, subset, metric = key.split("/")
        if task == "sts" and metric == "spearman" and subset != "mean":
            rows[f"STS {name} {subset}, Spearman"] = value
        if (task, metric) in (("classification", "accuracy"), ("pair_classification", "ap")) \
                and subset in ("mean", "en", "dev", "test"):
            rows[f"{task} {name} {subset}, {metric}"] = value
    return rows


def main(argv=None):
    """Score every model on every set, print the table, write the JSON file."""
    cfg = load_config(RealConfig, argv)
    ours = Embedder(cfg.checkpoint)
    longest = ours.model.config.block_size
    if not 0 <= cfg.max_len <= longest:
        raise ValueError(f"max_len {cfg.max_len} must lie in 0 .. {longest}")
    ours.max_len = cfg.max_len or ours.max_len     # others read all of a passage, or 256 tokens
    models = {"nanoConan": ours}
    if cfg.bm25:
        models["BM25"] = tasks.LexicalBaseline()
    if cfg.sentence_transformer:
        models[Path(cfg.sentence_transformer).name] = \
            tasks.SentenceTransformerBaseline(cfg.sentence_transformer)
    made = Path(cfg.checkpoint).parent / "sets"
    before = json.loads(Path(cfg.out).read_text())["results"] if Path(cfg.out).is_file() else {}
    found = {name: before.get(name, {}) for name in models} | {"nanoConan": {}}
    for task, path in jobs(cfg.root, made):
        if cfg.only and task not in cfg.only:
            continue
        for name, model in models.items():
            if name == "BM25" and task != "retrieval" or name != "nanoConan" and name in before:
                continue                           # baselines do not change
            found[name] |= evaluate(model, task, path)
            print(f"{task} {sets_name(path)}: {name}", flush=True)
    table = {name: headline(results) for name, results in found.items()}
    print("\n" + markdown(table))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps({"table": table, "results": found}, indent=1) + "\n")


def sets_name(path):
    """Return the name of a set by its folder or file."""
    return path.parent.name if path.is_file() else path.name


def markdown(table):
    """Write {model: {row: number}} as a table, a column for each model."""
    rows = dict.fromkeys(row for column in table.values() for row in column)
    lines = ["| | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for row in rows:
        values = [column.get(row) for column in table.values()]
        lines.append(f"| {row} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values)
                     + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
