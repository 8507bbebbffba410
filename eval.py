"""Score an embedder on MTEB's task types, on MKQA's protocol and for Figure 3 (Tables 1, 3, 13).

    python eval.py --checkpoint=out/embed_sup                     # the embedded documentation
    python eval.py --checkpoint=out/embed_sup --retrieval=DIR,DIR --sts=FILE --dims=64,128
    python eval.py --bm25 --retrieval=DIR                         # the baseline, by the same code
    python eval.py --sentence_transformer=NAME_OR_DIR --sts=FILE

It prints a table and writes {"<task>/<set>/<subset>/<metric>": number}, where ":64" at the end
stands for the first 64 dimensions. Rows with `lang` are scored per language, retrieval per pair of
query and passage language with the passages of that language as candidates; "mean" is the mean
over those. The tasks are in tasks.py, the metrics in metrics.py; here are files and languages.
"""

import dataclasses
import hashlib
import json
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
    "Reranking": "retrieval",
    "BitextMining": "bitext",
    "STS": "sts",
    "PairClassification": "pair_classification",
    "Classification": "classification",
    "Clustering": "clustering",
    "Summarization": "summarization",
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
    checkpoint: str = ""  # the model: a folder that train.py wrote
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
    split: str | None = None  # rows of this split (none: test, else dev, else validation, else all)
    dims: tuple[int, ...] = ()  # also score these first dimensions (MRL)
    batch_size: int = 32  # texts per forward pass
    out: str = ""  # the JSON file (empty: eval.json in the checkpoint's folder)

    def __post_init__(self):
        if sum(map(bool, (self.checkpoint, self.sentence_transformer, self.bm25))) != 1:
            raise ValueError("give one of --checkpoint, --sentence_transformer and --bm25")
        if self.bm25 and self.dims:
            raise ValueError(f"BM25 has no dimensions to cut: dims={self.dims}")


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


class MtebModel:
    """Hand an `Embedder` to mteb 2: the four members that it asks of a model.

        mteb.evaluate(MtebModel(Embedder("out/embed_sup")), mteb.get_tasks(tasks=["STS17"]))

    mteb keeps scores by name and revision and would give a second local model those of the first;
    the revision is therefore a hash of how the model embeds a sentence.
    """

    def __init__(self, encoder, name="nanoconan/local"):
        from mteb.models.model_meta import ModelMeta

        probe = encoder.encode(["What the revision is a hash of."])
        revision = hashlib.sha256(np.ascontiguousarray(probe)).hexdigest()[:16]
        known = {"name": name, "revision": revision, "embed_dim": probe.shape[1]}
        self.encoder, self.mteb_model_meta = encoder, ModelMeta.create_empty(known)

    def encode(self, inputs, *, task_metadata, prompt_type=None, batch_size=32, **_):
        """Embed the texts of mteb's batches, with our prompt for the type of task, if any."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = PROMPTS.get(MTEB_TYPES.get(task_metadata.type))
        if prompt_type is not None and prompt_type.value == "document":
            prompt = None
        return self.encoder.encode(texts, batch_size=batch_size, prompt=prompt)

    def similarity(self, left, right):
        """Return all cosines (N, M); a single vector counts as one row."""
        left, right = (torch.as_tensor(side).float() for side in (left, right))
        return torch.atleast_2d(left) @ torch.atleast_2d(right).T

    def similarity_pairwise(self, left, right):
        """Return the cosine of each row with its counterpart (N,)."""
        return (torch.as_tensor(left).float() * torch.as_tensor(right).float()).sum(-1)


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


def load_encoder(config):
    """Return what the options name: an Embedder or one of the two baselines."""
    if config.bm25:
        return tasks.LexicalBaseline()
    if config.sentence_transformer:
        return tasks.SentenceTransformerBaseline(config.sentence_transformer)
    from embed import Embedder

    return Embedder(config.checkpoint)


def main():
    config = load_config(EvalConfig)
    encoder, results = load_encoder(config), {}
    checkpoint = Path(config.checkpoint or "out")
    folder = checkpoint.parent if (checkpoint / "manifest.json").is_file() else checkpoint
    out = Path(config.out) if config.out else folder / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ("retrieval", "mkqa", *ROW_TASKS)
    jobs = [(task, path) for task in names for path in getattr(config, task)]
    for task, path in jobs or [("retrieval", DOCS)]:
        start = time.perf_counter()
        scores = evaluate(
            encoder, task, path, config.split, config.dims, config.batch_size,
            picture=out.parent / f"figure3_{set_name(path)}.png" if task == "figure3" else None,
        )
        if twice := results.keys() & scores.keys():
            raise ValueError(f"{path}: another set gave {min(twice)!r} already; rename its folder")
        results |= scores
        print(f"{table(scores)}\n({path}: {time.perf_counter() - start:.1f} s)", flush=True)
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
