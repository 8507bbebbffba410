"""What a run shows and hears: progress bar, log file, stop signals, and the tables at its end."""
import json
import os
import re
import shlex
import signal
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from engine import budget, distributed, memory, run
from engine.jsonl import read_object, write_object

SHOWN = ("ndcg@10", "recall@1", "recall@10")       # of retrieval; the files have all metrics
LANGUAGE_PAIR = re.compile(r"[a-z]{2,3}([-_]\w+)?-[a-z]{2,3}([-_]\w+)?")      # zh-Hant-en


STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StopSignal:
    """Remember that SIGTERM, SIGINT or SIGHUP came; the loop looks at it between two steps.

    SIGHUP: a terminal was closed; torchrun hands it on. What nohup ignores stays ignored.
    """

    def __init__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self._note) for s in STOPS
                       if s.name != "SIGHUP" or signal.getsignal(s) != signal.SIG_IGN}

    def _note(self, number, frame):
        if number == self.number == signal.SIGINT:     # a second Ctrl-C does not wait; SIGTERM may
            raise KeyboardInterrupt                    # come twice, from torchrun and from outside
        self.number = number

    def restore(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_log(path, step):
    """Open a log to append to it, without what a killed run wrote after its last checkpoint.

    Lines of steps after `step`, and a half line at the end, are cut off: each step stands there
    once.
    """
    size = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{path}:{number}: damaged, {error}; repair the line or move the "
                                 "file away") from None
            size += len(line)
        file.truncate(size)
    return open(path, "a", encoding="utf-8")


def print_tasks(cfg, tasks):
    """Print rows, batches and candidates of each task, and where DHNM can hardly act.

    PAPER Sec. 3.4: a replacement acts at its query's next visit. With one visit there is none.
    """
    total, kinds = sum(weight for _, weight in tasks), [task.kind for task, _ in tasks]
    if cfg.stage == "embed_sup":
        for kind, share in cfg.task_weights.items():
            if share > 0 and kind not in kinds:
                print(f"{kind}: no data, left out", flush=True)
    for task, weight in tasks:
        steps = cfg.steps * weight / total
        name = Path(task.rows.files[0].path).name if cfg.stage == "embed_weak" else task.kind
        each = 1 + (cfg.n_negatives if task.pool else 0)
        visits = steps * task.size / len(task.rows)
        dynamic = task.pool and cfg.dhnm != "fixed"
        candidates = "" if task.kind == "sts" else f"{task.size * each} candidates a query, "
        print(f"{name}: {len(task.rows):,} rows, {candidates}about {steps:.0f} steps "
              f"of {task.size}, {visits:.1f} visits a row"
              + (": too few for DHNM" if dynamic and visits < 2 else ""), flush=True)
        if dynamic and task.pool.depth <= cfg.n_negatives:
            print(f"warning: {name}: DHNM cannot act, since no query has more than the "
                  f"{cfg.n_negatives} candidates that are in use", flush=True)


class Log:
    """The progress bar, and OUT/STAGE/log.jsonl with the same keys."""

    def __init__(self, cfg, world, step):
        self.cfg, self.world = cfg, world
        self.file = open_log(cfg.run_dir / "log.jsonl", step) if world.is_main else None
        self.bar = tqdm(total=cfg.steps, initial=step, desc=cfg.stage, unit="step",
                        disable=not world.is_main, mininterval=1.0)
        self.peak = distributed.peak_flops(world.device)
        self._restart()

    def _restart(self):
        self.since, self.tokens, self.data, self.flops = time.perf_counter(), 0, 0.0, 0

    def step(self, step, batch, measured, data_seconds, known):
        """Take one step's numbers; every `log_every` steps write them.

        measured: this rank's, to be averaged over ranks; known: the same on all ranks. `mfu`, the
        share of the chip's nominal FLOP/s that the model's own FLOPs make, is there on chips whose
        figure is known; `device_gb`, the most memory so far, on every accelerator.
        """
        lm = batch.targets is not None
        if self.peak:
            self.flops += budget.flops(self.cfg.model_config(), Counter(batch.lengths), lm)
        self.tokens += len(batch.ids) * self.world.size
        self.data += data_seconds
        self.bar.update()
        if (step + 1) % self.cfg.log_every and step + 1 < self.cfg.steps:
            return
        seconds = time.perf_counter() - self.since
        row = {"step": step + 1, "task": batch.task, **self.world.mean(measured), **known,
               "tokens_per_second": self.tokens / seconds, "data_share": self.data / seconds}
        if self.peak:
            row["mfu"] = self.flops / seconds / self.peak
        if module := distributed.device_module(self.world.device.type):
            row["device_gb"] = module.max_memory_allocated() / 1e9
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            name = f"{row['task']} " if self.cfg.stage == "embed_sup" else ""    # losses differ
            held_out = f", held-out {row['validation']:.2f}" if row.get("validation") else ""
            self.bar.set_postfix_str(f"{name}loss {row['loss']:.2f}{held_out}")
        self._restart()

    def close(self, truncated):
        """Finish the bar and the files; say how often a text was cut."""
        self.bar.close()
        if truncated and self.world.is_main:
            queries = f"queries at {self.cfg.query_len} tokens, others " \
                if self.cfg.stage.startswith("embed") else ""
            tqdm.write(f"{self.cfg.stage}: texts were cut {truncated:,} times, {queries}at "
                       f"{self.cfg.passage_len} tokens")
        if self.file:
            self.file.close()


# ---------------------------------------------------------------- tables

def is_language_pair(key):
    """Tell whether a key is of one pair of languages: retrieval/SET/zh-Hant-en/METRIC."""
    return LANGUAGE_PAIR.fullmatch(key.split("/")[2])


def print_table(name, scores, dims):
    """Print the scores of a set: a row for each stage, and for each MRL dim of stage 4."""
    metrics = dict.fromkeys(key.rpartition("/")[2] for results in scores.values()
                            for key in results if key.rpartition("/")[0] == name and ":" not in key)
    if name.startswith("retrieval/"):
        metrics = SHOWN
    print(f"\n{name:<40}" + "".join(f"{m:>13}" for m in metrics))
    for label, results in scores.items():
        for dim in ["", *(f":{d}" for d in dims)]:         # of stage 4 alone
            values = [results.get(f"{name}/{m}{dim}") for m in metrics]
            if None not in values:
                shown = f"{label}, first {dim[1:]} dims" if dim else label
                print(f"{shown:<40}" + "".join(f"{v:>13.3f}" for v in values))


def print_languages(scores):
    """Print nDCG@10 of each pair of languages, query's and passage's: a column for each stage."""
    sets = {}
    for label, results in scores.items():
        for key, value in results.items():
            if key.endswith("/ndcg@10") and is_language_pair(key):
                _, name, pair, _ = key.split("/")
                sets.setdefault(name, {}).setdefault(pair, {})[label] = value
    for name, pairs in sets.items():
        print(f"\n{f'retrieval/{name}, ndcg@10':<30}" + "".join(f"{label:>12}" for label in scores))
        for pair, values in sorted(pairs.items()):
            cells = (f"{values[label]:.2f}" if label in values else "" for label in scores)
            print(f"{pair:<30}" + "".join(f"{cell:>12}" for cell in cells))


def print_summary(scores, dims):
    """Print what stages and baselines scored; scores: {label: flat results}.

    The mean over languages stands for all of them together.
    """
    names = dict.fromkeys(key.rpartition("/")[0] for results in scores.values() for key in results
                          if not is_language_pair(key))
    for name in names:
        if not (name.endswith("/all") and f"{name[:-3]}mean" in names):
            print_table(name, scores, dims)
    print_languages(scores)


def summarise(cfg, stages, scores, minutes, trained):
    """Print the stages up to cfg.stage beside `scores` of baselines; write OUT/summary.json.

    stages: the names of all. scores: {label: flat results}. trained: whether any stage was trained
    now; if not, minutes, memory and versions stay those of the run before.
    """
    scores, path = dict(scores), Path(cfg.out) / "summary.json"
    for stage in stages[:stages.index(cfg.stage) + 1]:
        written = Path(cfg.out) / stage / "eval.json"
        if written.is_file():
            scores[stage] = read_object(written)
    print_summary(scores, [d for d in cfg.dims if d < cfg.n_embd])
    cost = {"minutes": minutes, "memory_gb": memory.held(), "cores": os.cpu_count(),
            "versions": run.versions()}
    if not trained and path.is_file():
        cost |= {key: value for key, value in read_object(path).items() if key in cost}
    write_object(path, cost | scores)
    spent = f"{cost['minutes']:.1f} minutes"
    if cost["memory_gb"]:                          # 0 where the system does not tell
        spent += f", {cost['memory_gb']:.1f} GB of memory"
    print(f"\n{spent}{'' if trained else ' before: nothing was left to train'}")
    print(f"checkpoint: {cfg.run_dir}\nscores:     {path}")
    if cfg.stage.startswith("embed"):
        where = "" if cfg.run_dir == Path("out/embed_sup") else \
            f" --checkpoint={shlex.quote(str(cfg.run_dir))}"
        corpora = [*cfg.evaluate, f"{cfg.data}/search", f"{cfg.data}/test"]
        corpus = next((c for c in corpora if any(Path(c).glob("corpus.jsonl*"))), "FOLDER")
        where += "" if corpus == "out/installed_docs/search" else f" --corpus={shlex.quote(corpus)}"
        print(f"search:     python embed.py{where} --query \"how do I compute the determinant of a "
              "matrix\"")


def table(results):
    """Format flat results as text: a line per task, set and subset, metric after metric.

    Of retrieval those that are shown everywhere.
    """
    rows = {}
    for key, value in results.items():
        name, metric = key.rsplit("/", 1)
        metric, _, dim = metric.partition(":")
        if name.startswith("retrieval/") and metric not in SHOWN:
            continue
        rows.setdefault(f"{name}, {dim} dims" if dim else name, []).append(f"{metric} {value:.4f}")
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {'  '.join(cells)}" for name, cells in rows.items())
