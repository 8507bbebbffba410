"""Score an embedder on MTEB's task types, on MKQA's protocol and for Figure 3 (Tables 1, 3, 13).

    python eval.py --checkpoint=out/embed_sup                     # the embedded documentation
    python eval.py --checkpoint=out/embed_sup --retrieval=DIR,DIR --sts=FILE --dims=64,128
    python eval.py --bm25 --retrieval=DIR                         # the baseline, by the same code
    python eval.py --sentence_transformer=NAME_OR_DIR --sts=FILE
    python eval.py --checkpoint=out/embed_sup --mteb="STS17,MTEB(eng, v2),MTEB(cmn, v1)"

It prints a table and writes {"<task>/<set>/<subset>/<metric>": number}, where ":64" at the end
stands for the first 64 dimensions. Rows with `lang` are scored per language, retrieval per pair of
query and passage language with the passages of that language as candidates; "mean" is the mean
over those. The tasks are in tasks.py, the metrics in metrics.py; here are files and languages.
"""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import tasks
from configurator import load_config
from data import PROMPTS, load_collection, read_jsonl
from metrics import (  # noqa: F401  (all of them are also eval's: `from eval import ndcg_at_k`)
    accuracy,
    average_precision,
    f1,
    hit_at_k,
    mean_average_precision,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    spearman,
    v_measure,
)
from tasks import judged_queries, languages_in, mean_of

DOCS = "out/installed_docs/test"  # the default collection, written by corpus.py
HELD_OUT = ("test", "dev", "validation")  # the split that is scored, in order of preference
# A file or folder of such a name is called after the folder it is in: my_set/data.jsonl.gz.
PLAIN_NAMES = ("data", "rows", "pairs", "bitext", "sentences", "titles", "train", *HELD_OUT)
MKQA_LANGUAGE = "en"  # of MKQA's passages
MTEB_TYPES = {  # mteb's types of task, and whose prompt they get
    "Retrieval": "retrieval",
    "InstructionRetrieval": "retrieval",
    "Reranking": "retrieval",
    "InstructionReranking": "retrieval",
    "BitextMining": "bitext",
    "STS": "sts",
    "PairClassification": "pair_classification",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "Clustering": "clustering",
    "Summarization": "summarization",
}
TABLE_1 = {  # the paper's columns: mteb's types of task
    "Class.": "Classification",
    "Clust.": "Clustering",
    "PairClass": "PairClassification",
    "Rerank": "Reranking",
    "Retri": "Retrieval",
    "STS": "STS",
    "Summ.": "Summarization",
    "Avg.": "tasks",
}

ROW_TASKS = {  # the tasks of one file: the function, and what each row must have
    "bitext": (tasks.bitext_mining, {}),  # two forms, see `bitext_groups`
    "sts": (tasks.sts, {"sentence1": str, "sentence2": str, "score": (int, float)}),
    "pair_classification": (
        tasks.pair_classification,
        {"sentence1": str, "sentence2": str, "label": int},
    ),
    "reranking": (tasks.reranking, {"query": str, "pos": list, "neg": list}),
    "classification": (tasks.classification, {"text": str, "label": (str, int), "split": str}),
    "clustering": (tasks.clustering, {"text": str, "label": (str, int)}),
    "summarization": (
        tasks.summarization,
        {"human_summaries": list, "machine_summaries": list, "relevance": list},
    ),
    "figure3": (tasks.language_separation, {"text": str, "lang": str}),
}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which model, which sets, and where the scores go."""

    checkpoint: str = ""  # the model: a folder that train.py or export.py wrote
    sentence_transformer: str = ""  # or: a sentence-transformers name or folder
    bm25: bool = False  # or: BM25, for the tasks that need no vectors
    retrieval: tuple[str, ...] = ()  # collections: corpus.jsonl, queries.jsonl, qrels.tsv (or .gz)
    mkqa: tuple[str, ...] = ()  # collections: queries in many languages, passages in English
    bitext: tuple[str, ...] = ()  # {query, pos, lang_q, lang_p} or {id, lang, text}
    sts: tuple[str, ...] = ()  # {sentence1, sentence2, score}
    pair_classification: tuple[str, ...] = ()  # {sentence1, sentence2, label: 0 or 1}
    reranking: tuple[str, ...] = ()  # {query, pos: [...], neg: [...]}
    classification: tuple[str, ...] = ()  # {text, label, split}
    clustering: tuple[str, ...] = ()  # {text, label}
    summarization: tuple[str, ...] = ()  # {human_summaries, machine_summaries, relevance}: lists
    figure3: tuple[str, ...] = ()  # {text, lang}
    mteb: tuple[str, ...] = ()  # names of mteb's tasks or benchmarks; their data is downloaded
    split: str | None = None  # rows of this split (none: test, else dev, else validation, else all)
    dims: tuple[int, ...] = ()  # also score these first dimensions (MRL)
    batch_size: int = 32  # texts per forward pass
    out: str = ""  # the JSON file to write (empty: add to the run's eval.json, see `place`)

    def __post_init__(self):
        if sum(map(bool, (self.checkpoint, self.sentence_transformer, self.bm25))) != 1:
            raise ValueError("give one of --checkpoint, --sentence_transformer and --bm25")
        if self.bm25 and self.dims:
            raise ValueError(f"BM25 has no dimensions to cut: dims={self.dims}")
        if self.bm25 and self.mteb:
            raise ValueError(f"BM25 has no vectors for mteb: mteb={self.mteb}")


def evaluate(encoder, task, path, split=None, dims=(), batch_size=32, picture=None):
    """Score one file or collection -> {"<task>/<set>/<subset>/<metric>[:dim]": float}.

    picture: where to draw figure3's rows (PNG).
    Raises ValueError for a malformed file, a split or language that is not there, a dim too large.
    """
    if not isinstance(encoder, tasks.LexicalBaseline):
        encoder = tasks.CachedEncoder(encoder, batch_size)
    if task in ROW_TASKS:
        function, required = ROW_TASKS[task]
        rows, subset = choose_split(
            list(read_jsonl(path, required)), split, path, with_train=task == "classification"
        )
        groups = groups_of(task, rows, subset, path)
    else:
        collection = load_collection(path)
        queries, subset = choose_split(collection.queries, split, path)
        subset = Path(path).name if Path(path).name in HELD_OUT else subset
        collection = dataclasses.replace(collection, queries=queries)

    results = {}
    for dim in (None, *dims):
        if task == "retrieval":
            scores = retrieval_by_language(encoder, collection, subset, dim)
        elif task == "mkqa":
            scores = mkqa(encoder, collection, dim)
        else:
            scores = {name: function(encoder, group, dim) for name, group in groups.items()}
            scores |= {"mean": mean_of(scores.values())} if len(scores) > 1 else {}
        for group, metrics in scores.items():
            for metric, value in metrics.items():
                cut = "" if dim is None else f":{dim}"
                results[f"{task}/{set_name(path)}/{group}/{metric}{cut}"] = value
    if picture:
        tasks.draw_languages(encoder, rows, picture)
    return results


def evaluate_collection(encoder, directory, dims=(), batch_size=32):
    """Score a retrieval collection -> the flat dict that `train.py` logs after each stage."""
    return evaluate(encoder, "retrieval", directory, dims=dims, batch_size=batch_size)


# ---------------------------------------------------------------- languages of a collection


def retrieval_by_language(encoder, collection, subset="all", dim=None):
    """Score the mixed pool as `subset`, then each "query-passage" pair of languages, and means."""
    results = {subset: tasks.retrieval(encoder, collection, dim)}
    cells = {}
    for q in languages_in(collection.queries):
        for p in languages_in(collection.corpus):
            part = part_of(collection, q, p)
            if judged_queries(part)[0]:
                cells[q, p] = tasks.retrieval(encoder, part, dim)
    if len(cells) > 1:
        results |= {f"{q}-{p}": cell for (q, p), cell in cells.items()}
        results["mean"] = mean_of(cells.values())
        same = [cell for (q, p), cell in cells.items() if q == p]
        cross = [cell for (q, p), cell in cells.items() if q != p]
        if same and cross:
            results |= {"mean_same": mean_of(same), "mean_cross": mean_of(cross)}
    return results


def mkqa(encoder, collection, dim=None):
    """Score queries of each language against the English passages (Table 3 / 13).

    "mean" is over the languages other than English. DEVIATES: a passage is relevant if the qrels
    say so (mteb); the original protocol looks for the answer's string in it.
    """
    results = {}
    for language in languages_in(collection.queries):
        part = part_of(collection, language, MKQA_LANGUAGE)
        if judged_queries(part)[0]:
            scores = tasks.retrieval(encoder, part, dim)
            results[language] = {m: scores[m] for m in ("recall@20", "recall@100", "ndcg@10")}
    foreign = [scores for language, scores in results.items() if language != MKQA_LANGUAGE]
    if not foreign:
        raise ValueError("mkqa needs `lang` in both files, and queries in more than English")
    return results | {"mean": mean_of(foreign)}


# ---------------------------------------------------------------- files and splits


def set_name(path):
    """Name a set after its file or folder.

    >>> set_name("shared/jsts/data.jsonl.gz"), set_name("my_sts.jsonl"), set_name("docs/test")
    ('jsts', 'my_sts', 'docs')
    """
    path = Path(path).resolve()
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return path.parent.name if name in PLAIN_NAMES else name


def choose_split(rows, split, path, with_train=False):
    """Return (the rows of a split, its name): `split`, or the first of HELD_OUT that is there.

    Rows that carry no split, or none of those, are all taken, as "all". `with_train` keeps the
    rows of "train" besides.
    """
    there = {row["split"] for row in rows if row.get("split")}
    chosen = split or next((name for name in HELD_OUT if name in there), None)
    if not there or chosen is None and not with_train:
        return rows, "all"
    wanted = {chosen or "test"} | ({"train"} if with_train else set())
    if not wanted <= there:
        raise ValueError(f"{path}: no rows of split {sorted(wanted - there)}, only {sorted(there)}")
    return [row for row in rows if row.get("split") in wanted], chosen


def groups_of(task, rows, subset, path):
    """Divide rows by language, if all have one -> {language or pair of them or `subset`: rows}."""
    if not rows:
        raise ValueError(f"{path}: no rows")
    if task == "bitext":
        return bitext_groups(rows, subset, path)
    if task == "figure3" or not all(row.get("lang") for row in rows):
        return {subset: rows}
    return {lang: [row for row in rows if row["lang"] == lang] for lang in languages_in(rows)}


def bitext_groups(rows, subset, path):
    """Group {query, pos, lang_q, lang_p} by language pair, or build such pairs by equal id.

    In the other form, {id, lang, text}, each language is paired with English (without English:
    with the first language there is).
    """
    groups = {}
    if all(isinstance(row.get(key), str) for row in rows for key in ("query", "pos")):
        for row in rows:
            pair = f"{row['lang_q']}-{row['lang_p']}" if "lang_q" in row else subset
            groups.setdefault(pair, []).append(row)
        return groups
    if not all(row.keys() >= {"id", "lang", "text"} for row in rows):
        raise ValueError(f"{path}: bitext rows need texts query and pos, or id, lang and text")
    texts = {(row["lang"], row["id"]): row["text"] for row in rows}
    if len(texts) != len(rows):
        raise ValueError(f"{path}: {len(rows) - len(texts)} rows repeat the id and lang of another")
    languages = languages_in(rows)
    pivot = "en" if "en" in languages else languages[0]
    for (lang, key), text in texts.items():
        if lang != pivot and (pivot, key) in texts:
            pair = {"query": text, "pos": texts[pivot, key]}
            groups.setdefault(f"{lang}-{pivot}", []).append(pair)
    if not groups:
        raise ValueError(f"{path}: no id occurs in {pivot!r} and in another language")
    return groups


def part_of(collection, query_language, passage_language):
    """Restrict a collection to the queries of one language and the documents of one."""
    return dataclasses.replace(
        collection,
        queries=[row for row in collection.queries if row.get("lang") == query_language],
        corpus=[row for row in collection.corpus if row.get("lang") == passage_language],
    )


# ---------------------------------------------------------------- mteb itself


class MTEBModel:
    """Hand an `Embedder` to mteb 2: the four members that it asks of a model.

        mteb.evaluate(MTEBModel(Embedder("out/embed_sup")), mteb.get_tasks(tasks=["STS17"]))

    dim: score the first dimensions alone. mteb keeps scores by name and revision, and gives a
    nameless second model those of the first; here they are the run's folder and the hash of the
    checkpoint (of another encoder: of how it embeds a sentence).
    """

    def __init__(self, encoder, dim=None):
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        self.encoder, self.dim, name = encoder, dim, "local"
        probe = encoder.encode(["What the revision is a hash of."], truncate_dim=dim)
        known = {"embed_dim": probe.shape[1]}
        if where := getattr(encoder, "checkpoint", None):
            name = where.parent.name if (where / "manifest.json").is_file() else where.name
            revision, model = encoder.fingerprint(), encoder.model
            known |= {
                "max_tokens": encoder.max_len,
                "n_parameters": model.count_params(),
                "n_embedding_parameters": model.embed_tokens.weight.numel(),
                "embed_dim": dim or sorted({*encoder.meta["train"].get("dims", ()), encoder.dim}),
            }
        else:
            rounded = np.round(probe.astype(np.float64), 3) + 0.0  # alike on any number of threads
            revision = hashlib.sha256(rounded.tobytes()).hexdigest()[:16]
        self.mteb_model_meta = ModelMeta.create_empty(
            known
            | {
                "name": f"nanoconan/{name}",
                "revision": revision if dim is None else f"{revision}-{dim}",
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
            }
        )

    def encode(self, inputs, *, task_metadata, prompt_type=None, batch_size=32, **_):
        """Embed the texts of mteb's batches, with our prompt for the type of task, if any."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = PROMPTS.get(MTEB_TYPES.get(task_metadata.type))
        if prompt_type is not None and prompt_type.value == "document":
            prompt = None
        return self.encoder.encode(
            texts, batch_size=batch_size, prompt=prompt, truncate_dim=self.dim
        )

    def similarity(self, left, right):
        """Return all cosines (N, M); a single vector counts as one row."""
        left, right = (torch.as_tensor(side).float() for side in (left, right))
        return torch.atleast_2d(left) @ torch.atleast_2d(right).T

    def similarity_pairwise(self, left, right):
        """Return the cosine of each row with its counterpart (N,)."""
        return (torch.as_tensor(left).float() * torch.as_tensor(right).float()).sum(-1)


def mteb_tasks(name):
    """Return (the tasks of one of mteb's tasks or benchmarks, whether it is a benchmark).

    Raises ValueError for an unknown name, ImportError without mteb.
    """
    try:
        import mteb
    except ImportError as error:
        raise ImportError("mteb is not installed: pip install mteb") from error
    try:
        return list(mteb.get_benchmark(name).tasks), True
    except KeyError:
        pass
    try:
        return list(mteb.get_tasks(tasks=[name])), False
    except KeyError as error:
        reason = error.args[0].removeprefix("KeyError: ")
        raise ValueError(f"mteb has no such task or benchmark: {reason}") from None


def evaluate_mteb(encoder, name, folder, dims=(), batch_size=32):
    """Run one of mteb's tasks or benchmarks -> {"mteb/<task>/<subset>/<metric>[:dim]": float}.

    A benchmark adds "mteb/<benchmark>/<type of task>/mean", and the means over "tasks" and over
    "types". mteb's own files go to `folder`; what is there already is not run again.
    Raises ValueError for an unknown name, ImportError without mteb.
    """
    chosen, is_benchmark = mteb_tasks(name)
    import mteb

    results, cache = {}, mteb.ResultCache(folder)
    for dim in (None, *dims):
        cut = "" if dim is None else f":{dim}"
        model, options = MTEBModel(encoder, dim), {"batch_size": batch_size}
        found = {}
        for task in chosen:
            done = mteb.evaluate(model, task, encode_kwargs=options, cache=cache).task_results[0]
            found.setdefault(task.metadata.type, []).append(done.get_score())
            results |= {key + cut: score for key, score in flat_scores(task, done.scores).items()}
        if is_benchmark:
            means = {kind: np.mean(scores) for kind, scores in found.items()}
            means["types"] = np.mean(list(means.values()))
            means["tasks"] = np.mean([score for scores in found.values() for score in scores])
            results |= {f"mteb/{name}/{k}/mean{cut}": float(mean) for k, mean in means.items()}
    return results


def flat_scores(task, scores):
    """Return {"mteb/<task>/<subset>/<metric>": float} of mteb's {split: [{main_score, ...}]}."""
    results = {}
    for split, rows in scores.items():
        for row in rows:
            parts = [split] if len(scores) > 1 or row["hf_subset"] == "default" else []
            parts += [row["hf_subset"].replace("/", "_")] if row["hf_subset"] != "default" else []
            key = f"mteb/{task.metadata.name}/{'-'.join(parts)}/{task.metadata.main_score}"
            results[key] = float(row["main_score"])
    return results


def join_names(parts):
    """Undo the command line's split at commas inside of brackets.

    >>> join_names(("STS17", "MTEB(eng", "v2)"))
    ['STS17', 'MTEB(eng, v2)']
    """
    names = []
    for part in parts:
        if names and names[-1].count("(") > names[-1].count(")"):
            names[-1] += f", {part}"
        else:
            names.append(part)
    return names


# ---------------------------------------------------------------- the command line


def table(results):
    """Format flat results as text: one block per task and set, a row per subset."""
    blocks = {}
    for key, value in results.items():
        task, name, subset, metric = key.split("/")
        metric, _, dim = metric.partition(":")
        row = f"{subset}, {dim} dims" if dim else subset
        blocks.setdefault(f"{task}/{name}", {}).setdefault(row, {})[metric] = value
    lines = []
    for title, rows in blocks.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        width = max(map(len, [title, *rows]))
        lines += ["", "  ".join([title.ljust(width), *metrics])]
        for subset, row in rows.items():
            cells = [f"{row[m]:.4f}".rjust(len(m)) if m in row else " " * len(m) for m in metrics]
            lines.append("  ".join([subset.ljust(width), *cells]))
    return "\n".join(lines)


def table_1(results):
    """Format the means of benchmarks as the paper's Table 1, in percent; "" if there are none."""
    rows = {}
    for key, value in results.items():
        task, name, kind, metric = key.split("/")
        metric, _, dim = metric.partition(":")
        if task == "mteb" and metric == "mean":
            rows.setdefault(f"{name}, {dim} dims" if dim else name, {})[kind] = value
    if not rows:
        return ""
    width = max(map(len, rows))
    lines = ["", "  ".join([" " * width, *(column.rjust(9) for column in TABLE_1)])]
    for name, means in rows.items():
        cells = (f"{100 * means[k]:.2f}" if k in means else "-" for k in TABLE_1.values())
        lines.append("  ".join([name.ljust(width), *(cell.rjust(9) for cell in cells)]))
    return "\n".join(lines)


def load_encoder(config):
    """Return what the options name: an Embedder or one of the two baselines."""
    if config.bm25:
        return tasks.LexicalBaseline()
    if config.sentence_transformer:
        return tasks.SentenceTransformerBaseline(config.sentence_transformer)
    from embed import Embedder

    return Embedder(config.checkpoint)


def main():
    """Score what the command line names."""
    config = load_config(EvalConfig)
    try:
        run(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"eval.py: error: {error}")


def place(config):
    """Return the JSON file to write: one for each model, so that no two models' scores mix.

    A run has eval.json, which train.py begins; a single checkpoint and a baseline have their own
    beside it.
    """
    if config.out:
        return Path(config.out)
    path = Path(config.checkpoint)
    if not config.checkpoint:
        return Path("out") / f"eval_{model_name(config)}.json"
    one = (path / "manifest.json").is_file()
    return path.with_name(f"eval_{path.name}.json") if one else path / "eval.json"


def model_name(config):
    """Return a short name of the model that the options name."""
    return Path(config.checkpoint or config.sentence_transformer or "bm25").name


def earlier(config, out):
    """Return the scores that stay: those of the file, unless --out has named it."""
    if config.out or not out.is_file():
        return {}
    try:
        return dict(json.loads(out.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out}: not a JSON object, delete it or give --out: {error}") from None


def run(config):
    """Score every set of the config, print the tables and write the JSON file."""
    encoder, results, out = load_encoder(config), {}, place(config)
    kept = earlier(config, out)  # raises before hours of scoring
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ("retrieval", "mkqa", *ROW_TASKS)
    jobs = [(task, path) for task in names for path in getattr(config, task)]
    jobs += [("mteb", name) for name in join_names(config.mteb)]
    for task, path in jobs or [("retrieval", DOCS)]:
        start = time.perf_counter()
        if task == "mteb":
            scores = evaluate_mteb(
                encoder, path, out.parent / "mteb", config.dims, config.batch_size
            )
        else:
            picture = out.parent / f"figure3_{set_name(path)}.png" if task == "figure3" else None
            scores = evaluate(
                encoder, task, path, config.split, config.dims, config.batch_size, picture
            )
        if task != "mteb" and (twice := results.keys() & scores.keys()):
            raise ValueError(f"{path}: another set gave {min(twice)!r} already; rename its folder")
        results |= scores
        print(f"{table(scores)}\n({path}: {time.perf_counter() - start:.1f} s)", flush=True)
    if not config.bm25:
        size = sum(p.numel() for p in encoder.model.parameters())
        results[f"model/{model_name(config)}/all/parameters"] = size
    text = json.dumps(kept | results, indent=1, ensure_ascii=False)
    out.write_text(f"{text}\n", encoding="utf-8")
    added = f", beside {len(kept.keys() - results.keys())} earlier numbers" if kept else ""
    print(f"{table_1(results)}\n\nwrote {out}{added}".lstrip("\n"))


if __name__ == "__main__":
    main()
