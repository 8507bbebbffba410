"""What a stage trains on: files, batches, the supervised mixture, and the pools of hard negatives.

PAPER Sec. 3.1.2, App. A, Table 11: retrieval, CLR and classification with InfoNCE and 7 hard
negatives, STS with CoSENT; one task a step, the same on every rank. Without data of one's own the
embedded documentation corpus stands in, its queries put through clr.py for CLR.
"""
import random
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clr
from toy import corpus
import data
from tools import sets
from engine.bm25 import BM25
from dhnm import HardNegativePool
from toy.lexicon import LexiconTranslator, Phrasing, bitext_rows, dictionary_rows
from tokenizer import Tokenizer

ALIGNED_LEN = 200                  # tokens of a sentence: all of nearly every one


def sources(cfg, kind):
    """Return the files of a kind: those given, else those made of `root` or the embedded corpus."""
    given = getattr(cfg, kind)
    if given:
        return given
    path = Path(cfg.out) / "sets" if cfg.root else Path(cfg.docs)
    found = sorted(map(str, (path / kind).glob("*.jsonl"))) or [str(path / f"{kind}.jsonl")]
    return tuple(found) if (cfg.root or uses_docs(cfg)) and Path(found[0]).is_file() else ()


def uses_docs(cfg):
    """Tell whether a run reads the embedded corpus: if it names no data of its own."""
    return not (cfg.root or cfg.text or cfg.pairs or cfg.retrieval or cfg.clr
                or cfg.classification or cfg.sts)


def ensure_files(cfg):
    """Make the files that a run reads, where they are made of something: see `sources`."""
    if cfg.root:
        sets.ensure(cfg.root, Path(cfg.out) / "sets")
    elif uses_docs(cfg):
        ensure_docs(cfg)


def ensure_docs(cfg):
    """Build the embedded corpus, and its queries in 26 languages, unless they are there."""
    folder = Path(cfg.docs)
    corpus.ensure(folder)
    translate, phrase, pairs = LexiconTranslator(), Phrasing(), folder / "pairs"
    built = (folder / "manifest.json").stat().st_mtime

    def is_stale(path):
        return not path.is_file() or path.stat().st_mtime < built

    if is_stale(folder / "clr.jsonl"):     # the last file: if it is there, all are
        rows = list(data.read_jsonl(pairs / "documentation.jsonl"))
        corpus.write_jsonl(pairs / "bitext.jsonl", bitext_rows(rows, translate, phrase))
        corpus.write_jsonl(pairs / "dictionary.jsonl", dictionary_rows(translate, phrase, times=6))
        rng = random.Random(0)
        corpus.write_jsonl(folder / "clr.jsonl", clr.build_clr(
            ({"query": row["input"], "pos": [row["output"]]} for row in rows),
            lambda text, lang: phrase(translate.words(text, lang), lang, rng),
            gates=[clr.script_gate(0.2), clr.copy_gate]))
    queries = folder / "clr_test" / "queries.jsonl"
    if is_stale(queries):                  # the same 100 questions in every language
        found = data.load_collection(folder / "test")
        queries.parent.mkdir(exist_ok=True)
        asked = [(q, lang) for q in found.queries[:100] for lang in clr.LANGUAGES]
        corpus.write_jsonl(queries.with_name("corpus.jsonl"),
                           ({**row, "lang": "en"} for row in found.corpus))
        queries.with_name("qrels.tsv").write_text("".join(
            f"{q['id']}/{lang}\t{q['id']}\t1\n" for q, lang in asked))
        corpus.write_jsonl(queries, ({"id": f"{q['id']}/{lang}", "lang": lang, "text": q["text"]
                                      if lang == "en" else translate(q["text"], lang)}
                                     for q, lang in asked))


def load_tokenizer(cfg, world):
    """Return the tokenizer of the run; train it on the pretraining text if it does not exist."""
    path = Path(cfg.out) / "tokenizer.tiktoken"

    def make():
        if not path.is_file():
            kinds = ["text", "pairs" if uses_docs(cfg) else "clr"]     # queries hold the languages
            kinds = [k for k in kinds if sources(cfg, k)] or ["pairs"]
            rows = [data.Rows(sources(cfg, k), k, skip_bad=True) for k in kinds]
            texts = (row if isinstance(row, str) else f"{row['query']}\n{row['pos'][0]}"
                     if kinds == ["pairs"] else row["query"]
                     for part in rows for row in (part[i] for i in range(len(part))))
            path.parent.mkdir(parents=True, exist_ok=True)
            Tokenizer.train(tqdm(texts, total=sum(map(len, rows)), desc="tokenizer", unit="text"),
                            cfg.vocab_size).save(path)
        return Tokenizer.load(path)

    tokenizer = world.main_first(make)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(f"{path}: {tokenizer.vocab_size} entries, more than vocab_size "
                         f"{cfg.vocab_size}")
    return tokenizer


def parallel_sentences(cfg, tokenizer):
    """Return {(language, language): [(ids, ids)]} of the bitext among a run's pairs, for align.py.

    ids: the sorted distinct tokens of a text, at most `ALIGNED_LEN` of them read: a sentence that
    is cut on one side lacks translations.
    """
    found = defaultdict(list)
    for row in (row for file in sources(cfg, "pairs") for row in data.read_jsonl(file)):
        sides = sorted([(row.get("lang_q"), row["query"]), (row.get("lang_p"), row["pos"][0])]) \
            if row.get("prompt") == "" else []
        if sides and sides[0][0] != sides[1][0]:           # not a paraphrase in one language
            ids = [np.unique(tokenizer.encode(text)[:ALIGNED_LEN]) for _, text in sides]
            found[sides[0][0], sides[1][0]].append(tuple(ids))
    if not found:
        raise ValueError("aligned_start needs bitext among the pairs: rows with lang_q, lang_p and "
                         "prompt \"\"")
    return found


class Task:
    """One kind of example and how its batches are made; `pool` is there where DHNM works."""

    def __init__(self, kind, cfg, tokenizer, world, files=()):
        self.kind, self.cfg, self.tokenizer, self.world = kind, cfg, tokenizer, world
        self.rows = world.main_first(lambda: data.Rows(files or sources(cfg, kind), kind,
                                                       skip_bad=cfg.skip_bad_lines))
        if self.rows.bad and world.is_main:
            tqdm.write(f"{kind}: {self.rows.bad:,} bad lines left out, {len(self.rows):,} taken")
        self.size = cfg.batch_sizes.get(kind, cfg.batch_size)
        self.prompt = data.PROMPTS["retrieval" if kind == "pairs" else kind] \
            if kind != "text" else None
        self.pool = self.passages = self.stream = None
        if cfg.stage == "embed_sup" and kind != "sts":
            self.passages = data.Passages(self.rows)
        if kind == "text":
            path = Path(cfg.out) / f"tokens-{self._hash()}.bin"
            self.stream = world.main_first(
                lambda: data.TokenStream(self.rows, tokenizer, path, cfg.seed))
        elif len(self.rows) < self.size:
            raise ValueError(f"{kind}: {len(self.rows)} rows are too few for a batch of "
                             f"{self.size}")
        if self.size % world.size:
            raise ValueError(f"a batch of {self.size} cannot be dealt to {world.size} ranks")

    def _hash(self):
        names = [file.state for file in self.rows.files]     # a changed file is another stream
        return f"{data.text_id(' '.join(names)):016x}"

    def load_pool(self, state):
        """Set up the pool of a run that goes on, from what `HardNegativePool.state_dict` gave."""
        if state:
            self.pool = HardNegativePool(state["candidates"], self.cfg.n_negatives,
                                         policy=self.cfg.dhnm)
            self.pool.load_state_dict(state)

    def asked(self, row):
        """Return a row's query with its instruction."""
        return data.format_query(row["query"], self.prompt if row["prompt"] is None
                                 else row["prompt"])

    def batch(self, k):
        """Return this rank's share of the task's k-th batch, a pure function of (seed, k).

        Batches do not straddle epochs, so that no query comes twice in one.
        """
        cfg, world, n = self.cfg, self.world, len(self.rows)
        share = self.size // world.size
        if self.stream:
            start = k * self.size + world.rank * share
            return data.lm_batch(self.stream, np.arange(start, start + share), cfg.passage_len)
        epoch, place = divmod(k, n // self.size)
        first = epoch * n + place * self.size + world.rank * share
        indices = data.shuffled(np.arange(first, first + share), n, cfg.seed)
        if self.kind == "sts":
            return data.sts_batch(self.rows, indices, self.tokenizer, cfg.query_len, self.prompt)
        if cfg.stage == "sft":
            return data.sft_batch(self.rows, indices, self.tokenizer, cfg.passage_len, self.prompt)
        negatives = self.pool.negatives(indices).numpy() if self.pool else None
        return data.contrastive_batch(self.kind, self.rows, indices, self.tokenizer, cfg.query_len,
                                      cfg.passage_len, self.prompt, negatives, self.passages)


def fill_pools(tasks, embedder):
    """Fill (or refill) the tasks' hard-negative pools with the model at hand.

    A row's own negatives are its candidates if all rows have some: label texts in classification.
    Else they are mined: the passages nearest to the query by cosine, and BM25's, hardest first. A
    model that has only seen English ranks nothing for a translated query, so CLR mines around the
    query's positive instead. Texts that two tasks share are embedded once.
    """
    vectors = {}
    for task in tasks:
        if task.passages is None:          # sts; and the stages before embed_sup
            continue
        cfg, p = task.cfg, task.passages
        if all(p.given):
            pools = [given[:cfg.pool_size] for given in p.given]
        else:
            show = task.world.is_main
            new = [i for i in range(len(p)) if p.ids[i] not in vectors]
            vectors.update(zip((p.ids[i] for i in new), embedder.encode(
                [p.text(i) for i in new], show_progress_bar=show)))
            passages = np.stack([vectors[key] for key in p.ids])
            if task.kind == "clr":
                queries, lexical = passages[[own[0] for own in p.positives]], None
            else:
                rows = [task.rows[q] for q in range(len(task.rows))]
                queries = embedder.encode([task.asked(row) for row in rows],
                                          show_progress_bar=show)
                lexical = BM25([p.text(i) for i in range(len(p))]).top_k(
                    [row["query"] for row in rows], cfg.pool_size)
                lexical = np.where(lexical[1] > 0, lexical[0], -1)
            pools = torch.from_numpy(data.mine(queries, passages, p.positives, p.ids,
                                               cfg.pool_size, cfg.negative_cap, lexical))
        if task.pool is None:
            task.pool = HardNegativePool(pools, cfg.n_negatives, policy=cfg.dhnm)
        else:
            task.pool.refill(pools)


def file_weight(weights, file):
    """Return how often rows of a file are drawn: by the last pattern that its name fits, else 1.

    >>> file_weight({"tldr*": 0.5, "*-bitext-*": 2}, "pairs/tldr-bitext-en.jsonl")
    2
    """
    return ([1.0] + [w for pattern, w in weights.items() if fnmatch(Path(file).stem, pattern)])[-1]


def build_tasks(cfg, tokenizer, world):
    """Return [(task, weight)] of a stage: one task, or the supervised mixture."""
    if cfg.stage == "pretrain":
        return [(Task("text", cfg, tokenizer, world), 1.0)]
    if cfg.stage == "sft":
        return [(Task("pairs", cfg, tokenizer, world), 1.0)]
    if cfg.stage == "embed_weak":      # one file a step: negatives of the positive's own origin
        files = {f: file_weight(cfg.file_weights, f) for f in sources(cfg, "pairs")}
        tasks = [(Task("pairs", cfg, tokenizer, world, [f]), w) for f, w in files.items() if w > 0]
        if not tasks:
            raise ValueError(f"file_weights {cfg.file_weights} leave no file of pairs")
        return [(task, len(task.rows) * weight) for task, weight in tasks]
    kinds = [k for k, w in cfg.task_weights.items() if w > 0 and sources(cfg, k)]
    if not kinds:
        raise ValueError("embed_sup needs data: --retrieval=, --clr=, --classification= or --sts=")
    return [(Task(k, cfg, tokenizer, world), cfg.task_weights[k]) for k in kinds]


