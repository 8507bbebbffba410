"""Data: formats, batches of each stage, the supervised mixture, pools of mined candidates.

One example a line, JSONL or JSONL.gz, UTF-8, in the formats that users already have:

    text            {"text"}
    pairs           {"instruction", "input"?, "output"}  or  {"query", "pos", "prompt"?}
    retrieval, clr, classification    {"query", "pos": [..], "neg": [..]?, "prompt"?, "cosines"?}
    sts             {"sentence1", "sentence2", "score"}
    a collection    corpus.jsonl, queries.jsonl, qrels.tsv (the BEIR form)

PAPER Sec. 3.1, App. A, Table 11. The rows of a step depend only on the seed and the step number
(engine/order.py), their hard negatives on DHNM's pools. So resuming needs no reader state.
UNSPECIFIED: the templates, of `format_query` and `format_sft`. A `prompt` is the instruction before
a query, as in sentence-transformers; in `sft_batch` alone it is instruction and input.
"""
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dhnm import should_replace
from engine.batch import Batch
from engine.collection import FOR_EVALUATION, check_score
from engine.distributed import ALONE
from engine.index import JsonlFiles, text_id
from engine.jsonl import is_json
from engine.mining import Miner
from engine.order import choice, shuffled
from engine.passages import Passages
from engine.pools import pool_of
from engine.tokens import TokenStream

# A query's instruction by task, unless its row has one. UNSPECIFIED: the words, and which tasks.
PROMPTS = {"retrieval": "Find", "clr": "Find", "classification": "Name the topic", "sts": "",
           "bitext": ""}


def format_query(text, instruction=None):
    """Put an instruction in front of a query; passages never carry one (PAPER Sec. 3.1.2).

    The line end keeps the instruction's tokens apart from the text's, unless that begins with one.
    """
    return f"{instruction}\n{text}" if instruction else text


def format_sft(instruction, text):
    """Write the prompt of an SFT example; the output follows it (PAPER Sec. 3.1.1)."""
    return format_query(text, instruction) + "\n\n"


def prompt_length(tokenizer, instruction):
    """Return how many tokens an instruction takes in front of a text."""
    return len(tokenizer.encode(format_query("", instruction))) if instruction else 0


# ---------------------------------------------------------------- rows

def _text(row, key):
    if key not in row:
        raise ValueError(f"key {key!r} is missing; the keys are {sorted(row)[:8]}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"key {key!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"key {key!r} is empty")
    return value


def _texts(row, key):
    values = row[key] if isinstance(row.get(key), list) else [_text(row, key)]
    return [_text({key: value}, key) for value in values]


def _numbers(values, n):
    if not isinstance(values, list) or len(values) != n or not all(
            type(v) in (int, float) and abs(v) < 3e38 for v in values):
        raise ValueError(f"key 'cosines' must be a list of {n} finite numbers, one a negative, not "
                         f"{str(values)[:40]}")
    return values


def parse_text(row):
    """Return the document of a {"text"} row."""
    return _text(row, "text")


def parse_pair(row):
    """Return {query, pos, neg, prompt} of a row in any of the pair and retrieval formats.

    pos is never empty, neg may be; prompt is None where the row says nothing. Where Alpaca's input
    is empty, the instruction is the query. cosines: of the negatives, where tools/mine.py wrote it.
    """
    if ("output" in row or "input" in row) and not {"query", "pos"} <= row.keys():
        prompt, pos = row.get("instruction"), [_text(row, "output")]
        if prompt and row.get("input") in ("", None):
            query, prompt = _text(row, "instruction"), ""
        else:
            query = _text(row, "input")
    else:
        query, pos, prompt = _text(row, "query"), _texts(row, "pos"), row.get("prompt")
        prompt = row.get("instruction") if prompt is None else prompt
    if not pos:
        raise ValueError("key 'pos' is an empty list")
    for key, value in row.items():
        if key.startswith(("neg", "hard_neg")) and value and not row.get("neg"):
            raise ValueError(f"key {key!r} is not read: hard negatives have the key 'neg'")
    if not isinstance(prompt, (str, type(None))):
        raise ValueError(f"the prompt must be a string, not {type(prompt).__name__}")
    pair = {"query": query, "pos": pos, "neg": _texts(row, "neg") if row.get("neg") else [],
            "prompt": prompt}
    if row.get("cosines") is not None:
        pair["cosines"] = _numbers(row["cosines"], len(pair["neg"]))
    return pair


def parse_sts(row):
    """Return {sentence1, sentence2, score} of an STS row.

    Only the order of scores counts. A batch mixes all files, so all need one scale; a run warns.
    """
    check_score(row)
    return {"sentence1": _text(row, "sentence1"), "sentence2": _text(row, "sentence2"),
            "score": float(row["score"])}


MINED = ("retrieval", "clr", "classification")     # kinds with hard negatives
PARSERS = {"text": parse_text, "pairs": parse_pair, "retrieval": parse_pair, "clr": parse_pair,
           "classification": parse_pair, "sts": parse_sts}


def open_rows(paths, kind, cache_dir="out/cache", skip_bad=False, world=ALONE):
    """Return the rows of several files of one kind as one sequence (engine/index.py)."""
    return JsonlFiles(paths, PARSERS[kind], cache_dir, skip_bad, kind in MINED, world)


# ---------------------------------------------------------------- batches

def lm_batch(windows, rows):
    """Return a `Batch` of windows (B, T + 1) with the next token of each place as its target.

    UNSPECIFIED: a window runs on over the ends of documents, and attention looks across them.
    """
    windows = torch.as_tensor(windows)                 # place t reads token t, predicts t + 1
    return Batch("text", windows[:, :-1].reshape(-1), [windows.shape[1] - 1] * len(windows), rows,
                 targets=windows[:, 1:].reshape(-1))


def sft_batch(examples, rows, tokenizer, max_len):
    """Return a `Batch` of prompt + output + end-of-text; only the output is predicted.

    examples: [(instruction, query, output)]. A prompt is cut as far as the output needs, but keeps
    half of the room at least, and its blank line. UNSPECIFIED: that the prompt is not predicted.
    """
    ids, targets, lengths, truncated = [], [], [], 0
    instructions, queries, outputs = zip(*examples)
    prompts = tokenizer.encode_batch(list(map(format_sft, instructions, queries)))
    blank = tokenizer.encode("\n\n")                       # ends a prompt: one token or two
    for prompt, output in zip(prompts, tokenizer.encode_batch(outputs)):
        truncated += len(prompt) + len(output) > max_len
        room = max(max_len // 2, max_len - len(output), 1)
        if len(prompt) > room:
            prompt = prompt[:max(room - len(blank), 0)] + blank[-room:]
        whole = (prompt + output + [tokenizer.eos_id])[:max_len + 1]
        ids += whole[:-1]                      # of the prompt only the last token predicts one
        targets += [-100] * (len(prompt) - 1) + whole[len(prompt):]
        lengths.append(len(whole) - 1)
    return Batch("sft", torch.tensor(ids), lengths, np.asarray(rows),
                 targets=torch.tensor(targets), truncated=truncated)


def token_stream(rows, tokenizer, cfg, world=ALONE):
    """Return the `TokenStream` of stage 1; its folder carries the hash of what it is made of."""
    made_of = " ".join([*rows.hashes, tokenizer.fingerprint()])
    folder = Path(cfg.out) / f"tokens-{text_id(made_of):016x}"
    return TokenStream(rows, tokenizer, folder, cfg.seed, world)


class Task:
    """One kind of example, and its batches; `pool` holds hard negatives where DHNM works."""

    def __init__(self, kind, cfg, tokenizer, world, files):
        self.kind, self.cfg, self.tokenizer, self.world = kind, cfg, tokenizer, world
        self.rows = task_rows(cfg, kind, files, world)
        self.size = cfg.batch_sizes.get(kind, cfg.batch_size)
        self.pool = self.passages = self.stream = None
        self.prompt = PROMPTS.get("retrieval" if kind == "pairs" else kind, "")  # of rows without
        self.prompts = self.rows.prompts + Counter({self.prompt: self.rows.bare})
        if self.rows.bad and world.is_main:
            tqdm.write(f"{kind}: {self.rows.bad:,} bad lines left out, {len(self.rows):,} taken")
        if kind == "sts" and world.is_main:
            warn_of_scales(self.rows)
        if cfg.stage == "embed_sup" and kind in MINED:
            self.passages = Passages(self.rows, world)
        if kind == "text":
            self.stream = token_stream(self.rows, tokenizer, cfg, world)
            self.stream.windows([0], cfg.passage_len)      # ValueError if the text is too short
        if cfg.stage.startswith("embed"):
            self.check_prompts()

    def check_prompts(self):
        """Raise ValueError for an instruction that leaves a query no token."""
        for prompt in self.prompts:
            if (n := prompt_length(self.tokenizer, prompt)) > self.cfg.query_len - 2:
                raise ValueError(f"{self.kind}: the instruction {prompt!r} takes {n} tokens and "
                                 f"leaves a query none; query_len is {self.cfg.query_len}")

    def load_pool(self, state):
        """Set the pool of a resumed run from what `HardNegativePool.state_dict` gave."""
        self.pool = pool_of(state["candidates"], self.world, self.cfg.n_negatives, self.cfg.dhnm)
        self.pool.load_state_dict(state)

    def examples_of(self, indices, epoch):
        """Return [(instruction, query, positive)].

        UNSPECIFIED: which of several positives; one is drawn anew in each epoch.
        """
        rows = [self.rows[int(i)] for i in indices]
        return [(self.prompt if row["prompt"] is None else row["prompt"], row["query"],
                 row["pos"][choice(len(row["pos"]), self.cfg.seed, epoch, i)])
                for i, row in zip(indices, rows)]

    def batch(self, k):
        """Return this rank's share of the task's k-th batch.

        Its rows are a pure function of (seed, k); hard negatives are those in use now. Batches of
        rows do not straddle epochs, so no row comes twice in one; windows of stage 1 may.
        """
        cfg, world, n = self.cfg, self.world, len(self.rows)
        share = self.size // world.size
        if self.stream:
            places = np.arange(share) + k * self.size + world.rank * share
            return lm_batch(self.stream.windows(places, cfg.passage_len), places)
        epoch, place = divmod(k, n // self.size)       # the last n % size of its order are left out
        first = epoch * n + place * self.size + world.rank * share
        indices = shuffled(np.arange(first, first + share), n, cfg.seed)
        if self.kind == "sts":
            return self._sts_batch(indices)
        if cfg.stage == "sft":
            return sft_batch(self.examples_of(indices, epoch), indices, self.tokenizer,
                             cfg.passage_len)
        return self._contrastive_batch(indices, epoch)

    def _sts_batch(self, indices):
        rows = [self.rows[int(i)] for i in indices]
        texts = [format_query(row[key], self.prompt) for key in ("sentence1", "sentence2")
                 for row in rows]
        skip = [prompt_length(self.tokenizer, self.prompt)] * len(texts)
        return Batch.of("sts", texts, [self.cfg.query_len] * len(texts), self.tokenizer, indices,
                        skip=skip, scores=torch.tensor([row["score"] for row in rows]))

    def _contrastive_batch(self, indices, epoch):
        """Return a `Batch` of queries, positives and, with a pool, hard negatives.

        An absent one is an empty text: all ranks have as many texts, and as many passes.
        """
        cfg, b = self.cfg, len(indices)
        prompts, queries, positives = zip(*self.examples_of(indices, epoch))
        texts = [*map(format_query, queries, prompts), *positives]
        negative_ids = None
        if self.pool:
            negatives = self.pool.negatives(indices)                        # (B, N), -1: absent
            hard = [self.passages.text(p) if p >= 0 else "" for p in negatives.flatten().tolist()]
            negative_ids = text_ids(hard).view_as(negatives).masked_fill(negatives < 0, -1)
            texts += hard
        known = [self.passages.positive_ids(int(i)) if self.passages else
                 [text_id(pos) for pos in self.rows[int(i)]["pos"]] for i in indices]
        others = len(texts) - b                                # of the texts that are no query
        return Batch.of(self.kind, texts, [cfg.query_len] * b + [cfg.passage_len] * others,
                        self.tokenizer, indices,
                        skip=[prompt_length(self.tokenizer, p) for p in prompts] + [0] * others,
                        query_ids=text_ids(queries), positive_ids=text_ids(positives),
                        negative_ids=negative_ids,
                        known_ids=pad_sequence([torch.tensor(ids) for ids in known], True, -1))


def text_ids(texts):
    """Return the ids of some texts, (len(texts),) int64; equal texts have equal ids."""
    return torch.tensor([text_id(text) for text in texts], dtype=torch.int64)


# ---------------------------------------------------------------- the mixture of a stage

def sources(cfg, kind):
    """Return the files of a kind: those that are named, else those in the folder `cfg.data`.

    Raises ValueError for a file there that is not packed as .gz, that lies there twice, or that is
    named as a held-out split.
    """
    if getattr(cfg, kind) or not cfg.uses_folder:
        return getattr(cfg, kind)
    folder = Path(cfg.data)
    files = [path for path in folder.glob("*") if path.name.startswith((f"{kind}.", f"{kind}-"))]
    files += (folder / kind).glob("[!.]*")
    for path in files:
        if path.suffix in (".zst", ".bz2", ".xz", ".zip", ".parquet"):
            raise ValueError(f"{path}: only JSONL and JSONL.gz are read")
        if path.with_name(f"{path.name}.gz") in files:
            raise ValueError(f"{path} lies beside its own .gz: keep one of them")
        if FOR_EVALUATION.search(path.name.lower().removesuffix(".gz").rpartition(".")[0]):
            raise ValueError(f"{path} would be trained on: rename it, or move it elsewhere")
    return tuple(sorted(str(path) for path in files
                        if is_json(path) and not path.name.endswith(".report.json")))


def task_files(cfg):
    """Return [(kind, files)], one for each task of a stage; ValueError if it has no data.

    UNSPECIFIED: the weak stage takes one file a step, so that negatives come from the positive's
    own origin. The others shuffle all files of a kind together.
    """
    if cfg.stage == "embed_sup":
        kinds = [kind for kind in PARSERS if cfg.task_weights.get(kind, 0) > 0]
    else:
        kinds = ["text"] if cfg.stage == "pretrain" else ["pairs"]
    files = {kind: sources(cfg, kind) for kind in kinds}
    tasks = [(kind, paths) for kind, paths in files.items() if paths]
    if not tasks and cfg.uses_folder:
        raise ValueError(f"{cfg.stage} needs data: {cfg.data} has no "
                         f"{' or '.join(f'{kind}.jsonl' for kind in kinds)}")
    if not tasks:
        raise ValueError(f"{cfg.stage} needs data: "
                         f"{', '.join(f'--{kind}=FILE' for kind in kinds)}; where files are named, "
                         "the folder --data is not read")
    if cfg.stage == "embed_weak":
        return [("pairs", [file]) for file in tasks[0][1]]
    return tasks


def task_rows(cfg, kind, files, world=ALONE):
    """Return the rows of a task's files.

    Raises ValueError if they are fewer than a batch, or a batch cannot be split over the ranks.
    """
    rows = open_rows(files, kind, skip_bad=cfg.skip_bad_lines, world=world)
    size = cfg.batch_sizes.get(kind, cfg.batch_size)
    if size % world.size:
        raise ValueError(f"{cfg.stage}: a batch of {size} {kind} rows cannot be split over "
                         f"{world.size} ranks")
    if kind != "text" and len(rows) < size:
        raise ValueError(f"{', '.join(map(str, files))}: {len(rows)} rows are too few for a batch "
                         f"of {size}")
    return rows


def hashes(cfg, world=ALONE):
    """Return {kind: {file: SHA-256}} of a stage's data; all ranks must call.

    A file that is named again has a number behind its name.
    """
    by_kind = {}
    for kind, files in task_files(cfg):
        own = by_kind.setdefault(kind, {})
        for path, content in zip(map(str, files), task_rows(cfg, kind, files, world).hashes):
            own[f"{path} ({len(own) + 1})" if path in own else path] = content
    return by_kind


def warn_of_scales(rows):
    """Warn of STS files whose highest scores differ much, by up to a thousand rows of each."""
    reach = {file.path: max(file[i]["score"] for i in range(0, len(file), len(file) // 1000 + 1))
             for file in rows.files}
    low, high = min(reach, key=reach.get), max(reach, key=reach.get)
    if reach[high] > 1.5 * reach[low] > 0:
        tqdm.write(f"warning: the scores of {high} reach {reach[high]:g}, those of {low} "
                   f"{reach[low]:g}; CoSENT compares them, so bring them onto one scale")


def build_tasks(cfg, tokenizer, world):
    """Return [(task, weight)] of a stage; the weak stage's files are weighted by rows.

    PAPER Table 11: stage 4 is a mixture of tasks, weighted by rows, so a task with larger batches
    takes fewer steps. UNSPECIFIED: a step is of one task; its negatives are of no other.
    """
    tasks = [Task(kind, cfg, tokenizer, world, files) for kind, files in task_files(cfg)]
    if cfg.stage != "embed_sup":
        return [(task, len(task.rows)) for task in tasks]
    return [(task, cfg.task_weights[task.kind] / task.size) for task in tasks]


def prompts_of(tasks):
    """Return {kind: the most frequent instruction of its rows}; print where there are several."""
    counts = {}
    for task in (task for task, _ in tasks if task.kind != "text"):
        kind = "retrieval" if task.kind == "pairs" else task.kind
        counts[kind] = counts.get(kind, Counter()) + task.prompts
    for kind, prompts in counts.items():
        if len(prompts) > 1 and tasks[0][0].world.is_main:
            tqdm.write(f"{kind}: rows carry several instructions; search and evaluation "
                       f"will use the most frequent one, {max(prompts, key=prompts.get)!r}")
    return {kind: max(prompts, key=prompts.get) for kind, prompts in counts.items()}


def fill_pools(tasks, embedder):
    """Give the tasks their pools of hard negatives, ranked by the model at hand; all ranks call.

    UNSPECIFIED: a row's own negatives come first; others are mined where it has fewer than
    `n_negatives`: the passages nearest to the query by cosine. UNSPECIFIED: for CLR those nearest
    to its positive, as a model after stage 3 hardly reads a translated query. Where all rows of a
    task bring their cosines (tools/mine.py), nothing is embedded. Ranks share the work.
    """
    tasks = [task for task in tasks if task.passages]
    if not tasks:
        return
    cfg = tasks[0].cfg
    miner = Miner(cfg.run_dir / "mining", embedder, tasks[0].world)
    miner.clear()                          # of a run that broke off: its model may be another
    keep = partial(without_easy, n=cfg.n_negatives)
    for task in tasks:
        kind, rows, passages, queries = task.kind, task.rows, task.passages, None
        if rows.is_scored:
            pools, _ = miner.of_rows(kind, passages, cfg.pool_size, keep)
        else:
            search = miner.passages(kind, passages)
            if kind != "clr":
                queries = miner.queries(kind, rows, task.prompt)
            pools, _ = miner.pools(kind, passages, queries, search,
                                   (cfg.pool_size, cfg.n_negatives), keep=keep)
        task.pool = pool_of(pools, task.world, cfg.n_negatives, cfg.dhnm)
    miner.clear()


def without_easy(pool, scores, n):
    """Return the pools (Q, P) without what Eq. 6 would discard at its first step, -1 padded.

    PAPER Sec. 3.4. UNSPECIFIED: what "the initial step" scores. Here it is mining: for CLR with the
    positive, not with the query, and for rows of tools/mine.py by its model. The first n stay, so
    no query is without.
    """
    scores = torch.from_numpy(scores)
    easy = should_replace(scores, scores).numpy()      # at first use S is S_0
    easy[:, :n] = False
    pool = np.where(easy, -1, pool)
    return np.take_along_axis(pool, np.argsort(pool < 0, axis=1, kind="stable"), 1)
