"""Train the cells of a table on shared stages, seed after seed, and measure them.

    WORK/data                       the files that all cells read
    WORK/lm0-1500/{pretrain,sft}    the language model of LM seed 0, 1,500 steps of stage 1
    WORK/seed3/linear/embed_weak    stage 3 of seed 3, on the language model of 3 % lm_seeds
    WORK/seed3/linear-clr/embed_sup        stage 4 on that stage 3

Each stage is `train.main([FILE])` with a config file of its own, written beside its results.
A finished stage is not repeated, an interrupted one resumes. Cells that differ in stage 4 share
stage 3. Steps, batches and learning rates are equal in all cells of a table.

UNSPECIFIED: Table 4's "without SM"; here the mask opens at the first step of stage 3.
DEVIATES: nDCG@10 of retrieval instead of MTEB's averages.
"""
import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from clr import LANGUAGES
from data import load_collection, parse_pair, sources
from embed import Embedder
from engine import checkpoint
from engine.jsonl import atomic, read_jsonl, write_jsonl
from engine.run import chain
from eval import evaluate
from experiments import probes
from experiments.results import write_result
from toy import build as toy
from toy.lexicon import LexiconTranslator
from train import STAGES, TrainConfig

PRETRAIN, SFT, WEAK, SUP = STAGES
ROWS = 800                         # supervised questions: few enough to be visited six times
ASKED = 100                        # test questions that are put into the other languages
TUNING_SEED = 1000                 # its runs choose the learning rates, on the dev questions
RATES = (0.5, 1.0, 2.0)            # multiples of the config's learning rate that are tried
LORA_RATES = (1.0, 3.0, 10.0)      # multiples of the chosen rate, for LoRA of rank 32


# ---------------------------------------------------------------- what a run wrote

class Missing(ValueError):
    """A file that a table or figure needs does not exist; the text names what writes it."""


def read_log(folder):
    """Return the rows of a stage's log.jsonl. Raises Missing without it."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise Missing(f"{path} is missing; train.py writes it")
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def read_scores(folder):
    """Return the flat scores of a stage's eval.json. Raises Missing without it."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        raise Missing(f"{path} is missing; train.py writes it at a stage's end")
    return json.loads(path.read_text("utf-8"))


def read_meta(folder):
    """Return the config.json of a stage's newest checkpoint. Raises Missing without one."""
    where = checkpoint.latest(Path(folder)) if Path(folder).is_dir() else None
    if where is None:
        raise Missing(f"{folder} has no checkpoint; train.py writes it")
    return json.loads(checkpoint.load(where, "config.json"))


def seconds(log):
    """Return the seconds of each row of a log, from its tokens and its tokens per second."""
    tokens = [0, *(row["tokens"] for row in log)]
    return [(b - a) / row["tokens_per_second"] for a, b, row in zip(tokens, tokens[1:], log)]


# ---------------------------------------------------------------- cells

@dataclass(frozen=True)
class Cell:
    """One row of a table: the settings in which its stages differ from those of other cells."""
    schedule: str = "linear"
    mask_axis: str = "row"
    mask_apply: str = "weights"
    pooling: str = "mean"
    lora_rank: int = 0             # 0: all weights
    lm_steps: int | None = None    # steps of stage 1; None: the config's; 0: no stages 1 and 2
    weak_steps: int = 0            # steps of stage 3; 0: the table's
    clr: bool = False
    dhnm: str = "fixed"

    def folder(self, stage):
        """Name the folder of a stage; cells that share the stage share the folder."""
        parts = [self.schedule]
        parts += [self.mask_axis] * (self.mask_axis != "row")
        parts += [self.mask_apply] * (self.mask_apply != "weights")
        parts += [self.pooling] * (self.pooling != "mean")
        parts += [f"lora{self.lora_rank}"] * bool(self.lora_rank)
        parts += [f"lm{self.lm_steps}"] * (self.lm_steps is not None)
        parts += [f"x{self.weak_steps}"] * bool(self.weak_steps)
        if stage == SUP:
            parts += ["clr"] * self.clr + ["dhnm"] * (self.dhnm == "v2")
        return "-".join(parts)


def table4_cell(sm, clr, dhnm, **rest):
    """Return the cell of Table 4 with these parts on."""
    return Cell("linear" if sm else "hard", clr=bool(clr), dhnm="v2" if dhnm else "fixed", **rest)


NOTHING, EVERYTHING = table4_cell(0, 0, 0), table4_cell(1, 1, 1)


def build_data(folder, source):
    """Write what the cells read into `folder`; return {kind: files} of the settings.

    source: a folder in the layout of train.py's `data`. Text and pairs are its own. Retrieval is
    its first `ROWS` questions, CLR the translations of these. "dev" and "test" hold all questions
    in English, and `ASKED` of them in 25 more languages.
    """
    folder, source = Path(folder), Path(source)
    if source.name == "installed_docs":
        toy.ensure(source)
    if not (folder / "test" / "qrels.tsv").is_file():
        rows = list(read_jsonl(source / "retrieval.jsonl"))[:ROWS]
        answers = {text for row in rows for text in parse_pair(row)["pos"]}
        translated = [row for row in read_jsonl(source / "clr.jsonl")
                      if set(parse_pair(row)["pos"]) & answers]
        if not translated:
            raise ValueError(f"{source / 'clr.jsonl'}: no row translates a question of "
                             f"{source / 'retrieval.jsonl'}")
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "retrieval.jsonl", rows)
        write_jsonl(folder / "clr.jsonl", translated)
        for split in ("dev", "test"):
            many_languages(source / split, folder / split)
    base = TrainConfig(data=str(source))
    return {"text": sources(base, "text"), "pairs": sources(base, "pairs"),
            "retrieval": (str(folder / "retrieval.jsonl"),),
            "clr": (str(folder / "clr.jsonl"),)}


def many_languages(source, folder):
    """Write a collection with all its questions in English and `ASKED` of them in 25 more."""
    collection, translate = load_collection(source), LexiconTranslator()
    queries = [{**row, "lang": "en"} for row in collection.queries]
    queries += [{"id": f"{row['id']}/{lang}", "lang": lang, "text": translate(row["text"], lang)}
                for row in collection.queries[:ASKED] for lang in LANGUAGES if lang != "en"]
    qrels = {row["id"]: collection.qrels[row["id"].removesuffix(
        "" if row["lang"] == "en" else f"/{row['lang']}")] for row in queries}
    probes.write_collection(folder, [{**row, "lang": "en"} for row in collection.corpus],
                            queries, qrels)


def columns(scores):
    """Return {"Multi", "Eng", "Zh"} in percent, from what `eval.py` wrote.

    Mean nDCG@10 of all other languages -> English, of English alone, and of Chinese -> English.
    """
    values = {key.split("/")[2].split("-")[0]: 100 * value for key, value in scores.items()
              if key.startswith("retrieval/") and key.endswith("-en/ndcg@10")}
    if not {"en", "zh"} <= values.keys():
        raise ValueError(f"scores of {', '.join(values) or 'no'} languages -> English: en and zh "
                         "are needed")
    foreign = [value for lang, value in values.items() if lang != "en"]
    return {"Multi": float(np.mean(foreign)), "Eng": values["en"], "Zh": values["zh"]}


# ---------------------------------------------------------------- training and measuring

class Lab:
    """Train cells in WORK and measure their checkpoints; every stage is trained once.

    cfg: experiments.ablation.AblationConfig. Raises ValueError for a folder whose stages were
    trained with other settings.
    """

    def __init__(self, cfg):
        self.cfg, self.work = cfg, Path(cfg.work).resolve()
        files = build_data(self.work / "data", Path(cfg.data).resolve())
        steps = {WEAK: cfg.weak_steps, SUP: cfg.sup_steps}
        changes = {SUP: {"task_weights": {"retrieval": 1.0, "clr": 1.0}, "pool_size": 50,
                         "dims": ()}}
        self.base = {}
        for stage in chain(TrainConfig, [f"{cfg.config}/{SUP}.py"]):
            self.base[stage.stage] = dataclasses.replace(
                stage, data=cfg.data, evaluate=(), log_every=1,
                steps=steps.get(stage.stage) or stage.steps, **files,
                **changes.get(stage.stage, {}))
        self.tuned = {"rates": {}, "lora": 1.0, "tried": {}}

    def lm_folder(self, seed, cell):
        """Return the folder of stages 1 and 2 of a cell."""
        steps = self.base[PRETRAIN].steps if cell.lm_steps is None else cell.lm_steps
        return self.work / f"lm{seed % self.cfg.lm_seeds}-{steps}"

    def rate(self, stage, cell, rates=None):
        """Return the learning rate of a stage; rates: {stage: rate} to try instead of the tuned."""
        chosen = {**self.tuned["rates"], **(rates or {})}
        times = self.tuned["lora"] if cell.lora_rank else 1.0
        return times * chosen.get(stage, self.base[stage].learning_rate)

    def home(self, seed, stage, cell, rates=None):
        """Return the `out` of an embedding stage; rates that are tried are part of its name."""
        tried = () if rates is None else (WEAK,) if stage == WEAK else (WEAK, SUP)
        suffix = "".join(f"-{self.rate(s, cell, rates):g}" for s in tried)
        return self.work / f"seed{seed}" / (cell.folder(stage) + suffix)

    def settings(self, seed, stage, cell, split="test", rates=None):
        """Return the `TrainConfig` of a stage of a cell; split: the questions it is scored on."""
        base, lm = self.base[stage], self.lm_folder(seed, cell)
        if stage in (PRETRAIN, SFT):
            own = {"seed": seed % self.cfg.lm_seeds, "out": str(lm)}
            if stage == SFT:
                return dataclasses.replace(base, **own, previous=str(lm / f"{PRETRAIN}.py"))
            return dataclasses.replace(base, **own, previous="", **shorter(base, cell.lm_steps))
        own = {"seed": seed, "learning_rate": self.rate(stage, cell, rates),
               "lora_rank": cell.lora_rank, "schedule": cell.schedule, "pooling": cell.pooling,
               "mask_axis": cell.mask_axis, "mask_apply": cell.mask_apply,
               "out": str(self.home(seed, stage, cell, rates)),
               "evaluate": (str(self.work / "data" / split),)}
        if stage == WEAK:
            steps = cell.weak_steps or base.steps
            own |= {"previous": "" if cell.lm_steps == 0 else str(lm / f"{SFT}.py"),
                    "steps": steps, "save_every": (steps + 1) // 2}
        else:
            weights = {k: w for k, w in base.task_weights.items() if k != "clr" or cell.clr}
            own |= {"dhnm": cell.dhnm, "task_weights": weights,
                    "previous": str(self.home(seed, WEAK, cell, rates) / f"{WEAK}.py")}
        return dataclasses.replace(base, **own)

    def train(self, seed, stage, cell, **options):
        """Train a stage of a cell unless it is finished; return its folder.

        options: those of `settings`. What train.py prints goes to OUT/STAGE.txt.
        """
        stages = [s for s in STAGES[:STAGES.index(stage) + 1]
                  if cell.lm_steps != 0 or s in (WEAK, SUP)]
        configs = [self.settings(seed, s, cell, **options) for s in stages]
        for cfg in configs:
            write_config(cfg)
        last = configs[-1]
        if not (last.run_dir / "eval.json").is_file():
            print(f"training {last.run_dir.relative_to(self.work)}", flush=True)
            with open(Path(last.out) / f"{stage}.txt", "a", encoding="utf-8") as text, \
                    contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                train.main([str(Path(last.out) / f"{stage}.py")])
        return last.run_dir

    def measure(self, folder):
        """Return {column: value} of an embedding stage: retrieval, and what can see a mask.

        Probes are kept in FOLDER/measures.json. Percent, but for "LM loss" (nats a token) and
        "Rank" (effective rank of the embeddings).
        """
        path = Path(folder) / "measures.json"
        kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        embedder = None
        for name, work in self.probes().items():
            if name not in kept:
                embedder = embedder or Embedder(folder)
                kept[name] = work(embedder)
                write_result(folder, "measures", kept)
        return columns(read_scores(folder)) | kept

    def probes(self):
        """Return {column: function of an embedder -> number}."""
        data, cfg = self.work / "data", self.cfg
        dev = load_collection(data / "dev")
        pairs = probes.order_triplets(dev)
        texts = [row["text"] for row in dev.corpus]
        work = {"Order": lambda e: 100 * probes.preference(e, pairs),
                **{name: lambda e, place=place: 100 * probes.long_passages(e, dev, place)
                   for name, place in (("First third", 0), ("Last third", 2))},
                "LM loss": lambda e: probes.lm_loss(e, texts),
                "Rank": lambda e: probes.embedding_rank(e, texts)}
        if cfg.pawsx:
            work["PAWS-X"] = lambda e: mean_score(e, "pair_classification", cfg.pawsx, "ap")
        if cfg.sts:
            work["STS"] = lambda e: mean_score(e, "sts", cfg.sts, "spearman")
        return work

    def tune(self, with_lora=False):
        """Choose the learning rates on the dev questions; all cells take the same.

        Each is the best by the mean over two cells, that with nothing on and that with all on, of
        Multi and Eng. LoRA's is a multiple of it, chosen at rank 32. Kept in WORK/rates.json.
        """
        path = self.work / "rates.json"
        if path.is_file():
            self.tuned = json.loads(path.read_text("utf-8"))
        for stage in (WEAK, SUP):
            if stage in self.tuned["rates"]:
                continue
            tried = {str(x): [self._try(stage, cell, {stage: x * self.base[stage].learning_rate})
                              for cell in (NOTHING, EVERYTHING)] for x in RATES}
            best = max(tried, key=lambda x: sum(tried[x]))
            self.tuned["rates"][stage] = float(best) * self.base[stage].learning_rate
            self.tuned["tried"][stage] = tried
            write_result(self.work, "rates", self.tuned)
        if with_lora and "lora" not in self.tuned["tried"]:
            cell, tried = dataclasses.replace(EVERYTHING, lora_rank=32), {}
            for times in LORA_RATES:
                self.tuned["lora"] = times
                tried[str(times)] = [self._try(SUP, cell, {})]
            self.tuned["lora"] = float(max(tried, key=lambda x: tried[x][0]))
            self.tuned["tried"]["lora"] = tried
            write_result(self.work, "rates", self.tuned)

    def _try(self, stage, cell, rates):
        """Return the mean of Multi and Eng on dev of a stage at some learning rates."""
        for each in (WEAK, stage):                 # stage 3 is shared by the rates of stage 4
            folder = self.train(TUNING_SEED, each, cell, split="dev", rates=rates)
        scores = columns(read_scores(folder))
        return (scores["Multi"] + scores["Eng"]) / 2


def shorter(cfg, steps):
    """Return the settings of the first `steps` steps of a stage 1; None: of all.

    The warm-up keeps its length in steps. A run that ends within it has the rate of that step.
    """
    if steps is None:
        return {}
    steps, warm = max(steps, 1), max(1, round(cfg.warmup * cfg.steps))
    return {"steps": steps, "warmup": min(1.0, warm / steps),
            "learning_rate": cfg.learning_rate * min(1.0, steps / warm)}


def write_config(cfg):
    """Write OUT/STAGE.py with every setting; ValueError if it exists with other ones."""
    path = Path(cfg.out) / f"{cfg.stage}.py"
    lines = [f"{key} = {value!r}" for key, value in dataclasses.asdict(cfg).items()]
    text = "\n".join(['"""Written by experiments/cells.py."""', *lines, ""])
    if path.is_file() and path.read_text("utf-8") != text:
        raise ValueError(f"{path}: this stage has other settings now; choose another --work")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(text)


def mean_score(encoder, task, path, metric):
    """Return the mean over languages, in percent, of a metric of one file."""
    values = {key.split("/")[2]: 100 * value for key, value in evaluate(
        encoder, task, path).items() if key.endswith(f"/{metric}")}
    return values.get("mean", next(iter(values.values())))
