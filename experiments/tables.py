"""Tables of a finished run: MKQA (Tables 3, 8, 9, 13), Table 5, and Appendix B's numbers.

    python -m experiments.tables mkqa                              # the default run in out/
    python -m experiments.tables mkqa --collection=FOLDER --out=out/real
    python -m experiments.tables table5 --sentence_transformer=NAME
    python -m experiments.tables numbers

MKQA's protocol (Sec. 4.4): questions in many languages, English passages. Limitations A.2 and A.3
group its languages by resources and by family. Tables 1, 2, 14 and 15 are `eval.py --mteb=`.
UNSPECIFIED: which languages are low-resource, and "Others": all that no other group has.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from clr import TABLE_7
from configurator import load_config
from embed import Embedder
from engine.jsonl import read_texts
from eval import LexicalBaseline, SentenceTransformerBaseline, evaluate, prompt_of
from experiments import paper, probes
from experiments.cells import Missing, read_meta
from experiments.results import markdown, write_result
from train import STAGES

WEAK, SUP = STAGES[2:]
METRICS = {"R@20": "recall@20", "R@100": "recall@100", "nDCG@10": "ndcg@10"}
HIGH, MID = ("en", "zh"), ("es", "fr", "ja", "de", "ru", "it", "pt")   # Limitations A.2
LEVELS = {"High-resource": HIGH, "Mid-resource": MID,
          "Low-resource": tuple(lang for lang in TABLE_7 if lang not in HIGH + MID)}
NAMED = {"Chinese": ("zh",), "Germanic": ("en", "de", "da", "nl", "no", "sv"),
         "Romance": ("es", "fr", "it", "pt"), "Slavic": ("pl", "ru"), "Arabic": ("ar",),
         "Korean": ("ko",)}                                            # Limitations A.3
FAMILIES = {**NAMED, "Others": tuple(lang for lang in TABLE_7
                                     if lang not in sum(NAMED.values(), ()))}


@dataclass(frozen=True)
class TablesConfig:
    """The settings of `python -m experiments.tables COMMAND`."""
    out: str = "out"               # a folder of train.py
    data: str = "out/installed_docs"
    collection: str = ""           # of mkqa: queries with `lang`, English passages
    sentence_transformer: str = ""         # a stock model beside ours: name or folder
    results: str = "results"


def systems(cfg, stages=(WEAK, SUP)):
    """Return {label: encoder}: BM25, the stock model, and the run after the given stages."""
    encoders = {"BM25": LexicalBaseline()}
    if cfg.sentence_transformer:
        name = cfg.sentence_transformer
        encoders[Path(name).name] = SentenceTransformerBaseline(name)
    for stage in stages:
        read_meta(Path(cfg.out) / stage)                       # raises Missing
        encoders[f"nanoConan, stage {STAGES.index(stage) + 1}"] = Embedder(Path(cfg.out) / stage)
    return encoders


def grouped(groups, values):
    """Return {group: mean of the values of its languages}; "zh_cn" and the like count for "zh"."""
    means = {}
    for group, members in groups.items():
        own = [value for lang, value in values.items() if lang.split("_")[0] in members]
        means[group] = sum(own) / len(own) if own else None
    return means


def mkqa(cfg):
    """Return MKQA's table: its metrics, recall@20 by language, by resource level, by family."""
    folder = Path(cfg.collection or Path(cfg.data) / "clr_test")
    if not folder.is_dir():
        raise Missing(f"{folder} is missing; name a collection by --collection=FOLDER")
    scores = {}
    for label, encoder in systems(cfg).items():
        flat = evaluate(encoder, "mkqa", folder)
        scores[label] = {}
        for key, value in flat.items():
            _, _, lang, metric = key.split("/")
            scores[label].setdefault(lang, {})[metric] = 100 * value
    r20 = {label: {lang: part["recall@20"] for lang, part in own.items() if lang != "mean"}
           for label, own in scores.items()}
    foreign = {label: {k: v for k, v in own.items() if k != "en"} for label, own in r20.items()}

    def by_group(groups, theirs):
        means = {label: grouped(groups, values) for label, values in foreign.items()}
        return [{"": group, "paper, MKQA": theirs[group],
                 **{label: part[group] for label, part in means.items()}} for group in groups]

    languages = list(dict.fromkeys([*paper.TABLE_13, *next(iter(r20.values()))]))
    return {"title": "MKQA's protocol: Tables 3, 8, 9 and 13, in percent", "tables": {
        "Table 3, mean over languages other than English": [
            *({"": f"paper, MKQA: {name}", **dict(zip(METRICS, values))}
              for name, values in paper.TABLE_3.items()),
            *({"": label, **{name: own["mean"][key] for name, key in METRICS.items()}}
              for label, own in scores.items())],
        "Table 13, recall@20": [{"": lang, "paper, MKQA": paper.TABLE_13.get(lang),
                                 **{label: own.get(lang) for label, own in r20.items()}}
                                for lang in languages],
        "Table 8, recall@20 by resource level": by_group(LEVELS, paper.TABLE_8),
        "Table 9, recall@20 by family": by_group(FAMILIES, paper.TABLE_9)},
        "notes": [f"Ours: {folder.name}, its questions against its English passages.",
                  "The paper's numbers are of another set. Compare orders, not sizes."]}


def timing(encoder, path):
    """Return the seconds that a file's queries take to encode, after a warm-up."""
    texts, prompt = read_texts(path), prompt_of(encoder, "retrieval", "query")
    encoder.encode(texts[:32], prompt=prompt)
    start = time.perf_counter()
    encoder.encode(texts, prompt=prompt)
    return time.perf_counter() - start


def table5(cfg):
    """Return Table 5: size, width, time over the test queries, MRL, score."""
    folder = Path(cfg.collection or Path(cfg.data) / "test")
    queries = folder / "queries.jsonl"
    rows = [{"Model": f"paper: {name}", "M parameters": size, "dims": dim, "time": f"{minutes} min",
             "MRL": mrl, "score": score}
            for name, (size, dim, minutes, mrl, score) in paper.TABLE_5.items()]
    for label, encoder in systems(cfg, (SUP,)).items():
        score = next(value for key, value in evaluate(encoder, "retrieval", folder).items()
                     if key.endswith("/ndcg@10"))
        row = {"Model": label, "score": 100 * score}
        if not isinstance(encoder, LexicalBaseline):
            size = sum(p.numel() for p in encoder.model.parameters())
            row |= {"M parameters": size / 1e6, "dims": encoder.encode(["a"]).shape[1],
                    "time": f"{timing(encoder, queries):.2f} s"}
        rows.append(row)
    rows[-1]["MRL"] = len(read_meta(Path(cfg.out) / SUP)["train"]["dims"]) > 1
    return {"title": "Table 5: practical factors", "tables": {"": rows}, "notes": [
        f"Ours: {folder.parent.name}/{folder.name}, nDCG@10 in percent. Time: its queries, once.",
        f"PyTorch had {torch.get_num_threads()} threads.",
        "The paper's scores are MTEB's, its minutes are of another set on one 910B."]}


def numbers(cfg):
    """Return Appendix B's probe: does an embedding tell "3 fairy tales" from "5 fairy tales"?"""
    stages = [stage for stage in STAGES if (Path(cfg.out) / stage).is_dir()]
    rows, triplets = [], probes.number_triplets()
    for label, encoder in systems(cfg, stages or STAGES).items():
        if not isinstance(encoder, LexicalBaseline):
            rows.append({"": label, "cos(q, same number) - cos(q, other number)":
                         probes.number_gap(encoder),
                         "right one nearer": probes.preference(encoder, triplets)})
    query, right, wrong = triplets[0]
    return {"title": "Limitations: numbers", "tables": {"": rows}, "notes": [
        f"{len(triplets)} triplets, like \"{query}\": \"{right}\" against \"{wrong}\"",
        "Each passage is right as often as it is wrong, so chance is 0.5.",
        "The paper prints no number. It says that models find numbers too dissimilar."]}


COMMANDS = {"mkqa": mkqa, "table5": table5, "numbers": numbers}


def main(argv=None):
    """Make the table that the first argument names; print it and write RESULTS/NAME.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"one of the commands {', '.join(COMMANDS)} is needed first, not "
                         f"{argv[0] if argv else 'none'}")
    cfg = load_config(TablesConfig, argv[1:])
    table = COMMANDS[argv[0]](cfg) | {"command": f"python -m experiments.tables {' '.join(argv)}"}
    for caption, rows in table["tables"].items():
        print("\n".join([caption, "", *markdown(rows), ""]))
    return write_result(cfg.results, argv[0], table)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.tables: error: {error}")
