"""Score an embedder: metrics, the tasks that it is trained for, MKQA's protocol, mteb.

    python eval.py --checkpoint=out/embed_sup                     # the built-in documentation
    python eval.py --checkpoint=out/embed_sup --retrieval=DIR,DIR --sts=FILE --dims=64,128
    python eval.py --bm25 --retrieval=DIR                         # the baseline, by the same code
    python eval.py --sentence_transformer=NAME_OR_DIR --sts=FILE
    python eval.py --checkpoint=out/embed_sup --mteb="STS17,MTEB(eng, v2),MTEB(cmn, v1)"

It prints the scores and writes one JSON object, {"<task>/<set>/<subset>/<metric>": number}. A ":64"
at the end stands for the first 64 dimensions. Rows with `lang` are scored per language, retrieval
per pair of query and passage language, with the passages of that language as candidates.
PAPER Sec. 4: Tables 1, 2 and 5 are read as MTEB(eng, v2) and MTEB(cmn, v1), Table 14 as (eng, v1).
Protocols are mteb's. Further types of task, such as clustering, are scored by --mteb alone.
"""
import contextlib
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
from configurator import load_config, run_command
from embed import Embedder
from engine import memory
from engine.bm25 import BM25, split_words
from engine.collection import (HELD_OUT, collections, document_text, labelled_files,
                               languages_in, read_groups, scored_collection, set_name,
                               validation_rows)
from engine.distributed import accelerator
from engine.jsonl import check_name, read_object, write_object
from engine.metrics import (average_precision, hit_at_k, mean_average_precision,
                            mrr_at_k, ndcg_at_k, recall_at_k, spearman)
from engine.mining import top
from engine.encoders import (CachedEncoder, LexicalBaseline, MTEBModel,  # noqa: F401
                                SentenceTransformerBaseline, SharedEncoder, evaluate_mteb,
                                join_names, prompt_of)
from engine.report import table
from mask import CAUSAL

DOCS = "out/installed_docs/test"   # the default collection, built by toy/
TOP_K = 1000                       # ranks that a search returns, as in mteb
SCORES_AT_ONCE = 2 ** 26           # of a search: 256 MB, of which there are three for a while


# ---------------------------------------------------------------- search

def rank_documents(encoder, queries, documents, k, kind):
    """Return the k best documents of each query by cosine: indices (Q, min(k, N)), best first.

    kind: "retrieval" or "bitext", which choose the prompts. Equal scores go by lower index. BM25
    finds only documents that share a word with the query; the ranks after those are -1.
    """
    if isinstance(encoder, LexicalBaseline):
        indices, scores = BM25(documents).top_k(queries, k)
        return np.where(scores > 0, indices, -1)
    # equal texts are embedded once, so that their scores are equal to the last bit
    number = {text: i for i, text in enumerate(dict.fromkeys(documents))}
    place = np.array([number[text] for text in documents])              # (N,)
    sides = ("query", "document") if kind == "retrieval" else (None, None)
    left, right = (encoder.encode(texts, prompt=prompt_of(encoder, kind, side))
                   for texts, side in zip((queries, list(number)), sides))
    left, right, place = (torch.from_numpy(x).to(accelerator()) for x in (left, right, place))
    k, rows, indices = min(k, len(documents)), max(1, SCORES_AT_ONCE // len(documents)), []
    for part in left.split(rows):
        scores = (part @ right.T)[:, place]                             # (rows, N)
        indices.append(top(scores, k)[1].cpu())
    return torch.cat(indices).numpy()


# ---------------------------------------------------------------- retrieval: {metric: float}

def mean_of(scores):
    """Average dicts of metrics, key by key; there must be at least one."""
    scores = list(scores)
    return {metric: float(np.mean([s[metric] for s in scores])) for metric in scores[0]}


def retrieval(encoder, collection):
    """Rank a collection's documents for each query that is judged.

    A query that is judged with zeros only counts 0. MAP is over the first 1,000 ranks. Of equal
    scores the larger id goes first, as in trec_eval.
    """
    queries = [row for row in collection.queries if collection.qrels.get(row["id"])]
    if not queries:
        raise ValueError("no query of the collection has a judged document in it")
    corpus = sorted(collection.corpus, key=lambda row: row["id"], reverse=True)
    ranking = rank_documents(encoder, [row["text"] for row in queries],
                     [document_text(row) for row in corpus], TOP_K, "retrieval")
    gains, judged = [], []
    for row, ranks in zip(queries, ranking):
        ids = [corpus[i]["id"] for i in ranks.tolist() if i >= 0]
        relevance = collection.qrels[row["id"]]
        if row["id"] in collection.without_self and row["id"] in ids:
            ids.remove(row["id"])
        gains.append([relevance.get(document, 0) for document in ids])
        judged.append(list(relevance.values()))
    return {"ndcg@10": ndcg_at_k(gains, 10, judged),
            **{f"recall@{k}": recall_at_k(gains, k, judged) for k in (1, 10, 20, 100)},
            "map": mean_average_precision(gains, judged=judged),
            "mrr@10": mrr_at_k(gains, 10), "hit@1": hit_at_k(gains, 1)}


def retrieval_by_language(encoder, collection, subset="all"):
    """Score the mixed pool as `subset`, then each "query-passage" pair of languages, and a mean."""
    cells = {}
    for q in languages_in(collection.queries):
        for p in languages_in(collection.corpus):
            part = part_of(collection, q, p)
            if has_answers(part):
                cells[f"{q}-{p}"] = retrieval(encoder, part)
    scores = {subset: retrieval(encoder, collection)}
    if len(cells) > 1:
        scores |= cells | {"mean": mean_of(cells.values())}
    return scores


def has_answers(collection):
    """Whether a query has a relevant document: without one, no ranking is better than another."""
    return any(gain > 0 for row in collection.queries
               for gain in collection.qrels.get(row["id"], {}).values())


def part_of(collection, query_language, passage_language):
    """Restrict a collection to the queries of one language and the documents of one.

    A query whose relevant documents are all in other languages is not judged in this part.
    """
    corpus = [row for row in collection.corpus if row.get("lang") == passage_language]
    ids, qrels = {row["id"] for row in corpus}, {}
    for query, judged in collection.qrels.items():
        here = {document: gain for document, gain in judged.items() if document in ids}
        if max(here.values(), default=0) > 0 or max(judged.values(), default=0) <= 0:
            qrels[query] = here
    queries = [row for row in collection.queries if row.get("lang") == query_language]
    return dataclasses.replace(collection, queries=queries, corpus=corpus, qrels=qrels)


def mkqa(encoder, collection):
    """Score queries of each language against the English passages (PAPER Tables 3 and 13).

    Where queries have `answers`, a passage is relevant if it has the words of one in a row. That is
    MKQA's protocol. Otherwise the qrels decide. Passages without any `lang` are English. "mean" is
    over the languages other than English: the paper's 25, with three of Chinese.
    """
    if not languages_in(collection.corpus):
        corpus = [{**row, "lang": "en"} for row in collection.corpus]
        collection = dataclasses.replace(collection, corpus=corpus)
    results = {}
    for language in languages_in(collection.queries):
        part = part_of(collection, language, "en")
        if part.corpus and any(row.get("answers") for row in part.queries):
            results[language] = answer_retrieval(encoder, part)
        elif has_answers(part):
            scores = retrieval(encoder, part)
            results[language] = {m: scores[m] for m in ("recall@20", "recall@100", "ndcg@10")}
    foreign = [scores for language, scores in results.items() if language != "en"]
    if not foreign:
        raise ValueError("mkqa needs `lang` in both files, English passages, and queries in "
                         "other languages")
    return results | {"mean": mean_of(foreign)}


def answer_retrieval(encoder, collection):
    """Score queries by the strings of their `answers`; those without any are left out.

    recall@k is the share of queries with an answer among the first k passages. UNSPECIFIED: the
    paper's nDCG@10; here the best order is that of the first 100 passages.
    """
    queries = [row for row in collection.queries if row.get("answers")]
    documents = [document_text(row) for row in collection.corpus]
    ranking = rank_documents(encoder, [row["text"] for row in queries], documents, 100, "retrieval")
    words = functools.cache(lambda i: f" {' '.join(split_words(documents[i]))} ")
    gains = []
    for row, ranks in zip(queries, ranking):
        answers = [f" {' '.join(split_words(answer))} " for answer in row["answers"]]
        gains.append([any(answer in words(i) for answer in answers if answer.strip())
                      for i in ranks.tolist() if i >= 0])
    return {"recall@20": hit_at_k(gains, 20), "recall@100": hit_at_k(gains, 100),
            "ndcg@10": ndcg_at_k(gains, 10)}


# ---------------------------------------------------------------- tasks on rows: {metric: float}

def bitext_mining(encoder, rows):
    """Find each sentence's translation among all of the group's, query -> pos and back.

    Positions count, as in MTEB: an equal sentence elsewhere in the group is a mistake.
    """
    left, right = ([row[side] for row in rows] for side in ("query", "pos"))
    hits, hits_back = (rank_documents(encoder, *sides, 1, "bitext")[:, 0] == np.arange(len(rows))
                       for sides in ((left, right), (right, left)))
    return {"accuracy": float(hits.mean()), "accuracy_reverse": float(hits_back.mean())}


def cosine_of(encoder, rows, kind):
    """Return the cosine of each row's sentence1 and sentence2 as (N,) floats."""
    left, right = (encoder.encode([row[side] for row in rows], prompt=prompt_of(encoder, kind))
                   for side in ("sentence1", "sentence2"))
    return (left * right).sum(1)


def sts(encoder, rows):
    """Correlate the cosine of sentence1 and sentence2 with `score`, by rank."""
    return {"spearman": spearman([row["score"] for row in rows], cosine_of(encoder, rows, "sts"))}


def pair_classification(encoder, rows):
    """Rank pairs by cosine; average precision of `label` 1."""
    return {"ap": average_precision([row["label"] for row in rows],
                                    cosine_of(encoder, rows, "pair_classification"))}


def classification(encoder, rows):
    """Fit logistic regression on 8 rows of each label with split "train", score the others.

    The mean of ten draws, which are the very ones of mteb.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError("classification needs: pip install scikit-learn") from None
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] != "train"]
    encode = functools.partial(encoder.encode, prompt=prompt_of(encoder, "classification"))
    labels, gold = (np.array([str(row["label"]) for row in part]) for part in (train, test))
    vectors, scores, order = encode([row["text"] for row in test]), [], np.arange(len(train))
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)       # one seed, but the order before it differs
        few = np.concatenate([order[labels[order] == name][:8] for name in np.unique(labels)])
        probe = LogisticRegression(max_iter=100, random_state=42)
        probe.fit(encode([train[i]["text"] for i in few]), labels[few])
        scores.append(np.mean(probe.predict(vectors) == gold))
    return {"accuracy": float(np.mean(scores))}


# ---------------------------------------------------------------- files and splits

ROW_TASKS = {"bitext": bitext_mining, "sts": sts, "pair_classification": pair_classification,
             "classification": classification}


def evaluate(encoder, task, path, split=None, dims=(), ignore_identical_ids=None):
    """Score one file or collection -> {"<task>/<set>/<subset>/<metric>[:dim]": float}.

    task: retrieval, mkqa or one of ROW_TASKS. ignore_identical_ids: see load_collection.
    Raises ValueError for a malformed file, a split or language that is not there, a dim too large.
    A "/" in a subset's name becomes "_".
    """
    if not isinstance(encoder, (LexicalBaseline, CachedEncoder)):
        encoder = CachedEncoder(encoder)
    if task in ROW_TASKS:
        groups = read_groups(task, path, split)
    else:
        collection, subset = scored_collection(path, split, ignore_identical_ids)
        subset = Path(path).name if Path(path).name in HELD_OUT else subset
    results = {}
    for dim in (None, *dims):
        cut, part = ("", encoder) if dim is None else (f":{dim}", encoder.first(dim))
        if task == "retrieval":
            scores = retrieval_by_language(part, collection, subset)
        elif task == "mkqa":
            scores = mkqa(part, collection)
        else:
            scores = {name: ROW_TASKS[task](part, rows) for name, rows in groups.items()}
            scores |= {"mean": mean_of(scores.values())} if len(scores) > 1 else {}
        for group, metrics in scores.items():
            name = f"{task}/{set_name(path)}/{group.replace('/', '_')}"
            results |= {f"{name}/{metric}{cut}": value for metric, value in metrics.items()}
    return results


# ---------------------------------------------------------------- what a stage of a run is worth

def lexical_scores(cfg):
    """Return the scores of BM25 on the collections of a run."""
    return {key: value for folder in collections(cfg)
            for key, value in evaluate(LexicalBaseline(), "retrieval", folder).items()}


def evaluate_stage(state):
    """Return the flat scores of a stage: its own measure, retrieval, STS, classes.

    state: engine.run.State. Stages 1 and 2 are measured by their loss on held-out text, too. All
    ranks must call, and embed; only the main one ranks documents, and has all scores.
    """
    cfg, results = state.cfg, {}
    if "validation" in state.counters and (loss := validation_loss(state)) is not None:
        name = f"lm/{Path(cfg.data).name}/dev/loss"
        results = {f"{name}_before": state.counters["validation_before"], name: loss}

    def work(encoder):
        scores = {}
        for folder in collections(cfg):
            scores |= evaluate(encoder, "retrieval", folder,
                              dims=cfg.dims if cfg.stage == "embed_sup" else ())
        for task, path in labelled_files(cfg).items() if cfg.stage.startswith("embed") else ():
            with contextlib.suppress(ImportError):     # scikit-learn is optional: see `read_ahead`
                scores |= evaluate(encoder, task, path)
        return scores
    return results | SharedEncoder(state.whole_embedder(), state.world).serve(work)


@torch.no_grad()
def validation_loss(state):
    """Return the next-token loss on `validation_rows`; None if there are none."""
    cfg, rows = state.cfg, validation_rows(state.cfg, state.prompts["retrieval"])
    if not rows:
        return None
    total = count = 0
    for i in range(0, len(rows), 50):
        batch = data.sft_batch(rows[i:i + 50], range(i, i + 50), state.tokenizer, cfg.passage_len)
        for ids, lengths, targets, _ in batch.to(state.world.device).chunks(cfg.micro_batch_size):
            n = int((targets != -100).sum())
            with state.world.autocast(state.dtype):
                total += float(state.wrapped(ids, lengths, CAUSAL, targets)) * n
            count += n
    return total / count


# ---------------------------------------------------------------- the command line

@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which model, which sets, and where the scores go."""
    checkpoint: str = ""               # the model: a folder that train.py or tools/export.py wrote
    sentence_transformer: str = ""     # or: a sentence-transformers name or folder
    trust_remote_code: bool | None = None      # whether that model's own code may run
    bm25: bool = False                 # or: BM25, for the tasks that need no vectors
    retrieval: tuple[str, ...] = ()    # BEIR folders; if no set is named, the default test
    mkqa: tuple[str, ...] = ()         # collections: queries in many languages, English passages
    bitext: tuple[str, ...] = ()       # {query, pos, lang_q, lang_p} or {id, lang, text}
    sts: tuple[str, ...] = ()          # {sentence1, sentence2, score}
    pair_classification: tuple[str, ...] = ()  # {sentence1, sentence2, label: 0 or 1}
    classification: tuple[str, ...] = ()   # {text, label, split}
    mteb: tuple[str, ...] = ()         # mteb's tasks or benchmarks by name; data is downloaded
    split: str | None = None           # none: test, else dev, else validation, else all rows
    ignore_identical_ids: bool | None = None   # a query's own document; none: if texts are equal
    dims: tuple[int, ...] = ()         # also score these first dimensions (MRL)
    out: str = ""                      # JSON file to write (empty: add to the model's own)

    def __post_init__(self):
        check_name(self.out, [path for task in ROW_TASKS for path in getattr(self, task)])
        if self.trust_remote_code is not None and not self.sentence_transformer:
            raise ValueError("--trust_remote_code is for --sentence_transformer")
        if sum(map(bool, (self.checkpoint, self.sentence_transformer, self.bm25))) != 1:
            raise ValueError("give one of --checkpoint, --sentence_transformer and --bm25")
        if self.bm25 and self.dims:
            raise ValueError(f"dims={self.dims}: BM25 has no vectors")
        if self.mteb and not self.checkpoint:
            raise ValueError(f"mteb={self.mteb} needs a --checkpoint")
        if self.mteb and (self.split or self.ignore_identical_ids is not None):
            raise ValueError(f"split={self.split} and ignore_identical_ids="
                             f"{self.ignore_identical_ids} are not for mteb: its tasks have theirs")

    @property
    def place(self):
        """The JSON file, one for each model: in its folder, where train.py begins it, or in out."""
        name = self.checkpoint or self.sentence_transformer or "bm25"
        if self.out or self.checkpoint or Path(name).is_dir():
            return Path(self.out or Path(name) / "eval.json")
        return Path(f"out/eval_{name.replace('/', '_')}.json")


def run(config):
    """Score every set of the config, print the scores; each set is added to the JSON file.

    Raises ValueError if train.py has begun the model's stage and not yet scored it.
    """
    if config.checkpoint and not config.out and not config.place.is_file() \
            and (config.place.parent / ".lock").is_file():
        raise ValueError(f"{config.place} is missing, and train.py's to begin: run its stage to "
                         "the end, or give --out")
    memory.keep_freed_memory()             # on a CPU paging it in anew takes a quarter of the time
    encoder = LexicalBaseline()
    if config.checkpoint:
        encoder = Embedder(config.checkpoint)
    elif config.sentence_transformer:
        encoder = SentenceTransformerBaseline(config.sentence_transformer,
                                              config.trust_remote_code)
    results, path = {}, config.place

    def earlier():                                 # another process may have added to it
        return read_object(path) if path.is_file() and not config.out else {}
    before = earlier()                             # these scores stay
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()    # a folder that is read-only shows now
    jobs = [(task, name) for task in ("retrieval", "mkqa", *ROW_TASKS)
            for name in getattr(config, task)]
    jobs += [("mteb", name) for name in join_names(config.mteb)]
    for task, name in jobs or [("retrieval", DOCS)]:
        start = time.perf_counter()
        if task == "mteb":
            scores = evaluate_mteb(encoder, name, path.parent / "mteb", config.dims)
        else:
            scores = evaluate(encoder, task, name, config.split, config.dims,
                              config.ignore_identical_ids)
            if twice := results.keys() & scores.keys():
                raise ValueError(f"{name}: another set gave {min(twice)!r} already; rename it")
        results |= scores
        print(f"{table(scores)}\n({name}: {time.perf_counter() - start:.1f} s)", flush=True)
        write_object(path, earlier() | results)
    added = f", beside {len(before.keys() - results.keys())} earlier numbers" if before else ""
    if replaced := [key for key in before.keys() & results.keys() if before[key] != results[key]]:
        added += f"; {len(replaced)} others replace earlier values"
    print(f"\nwrote {path}{added}")


def main():
    """Score what the command line names."""
    config = load_config(EvalConfig)
    run_command(lambda: run(config))


if __name__ == "__main__":
    main()
