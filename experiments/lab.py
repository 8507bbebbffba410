"""Train the cells of a grid on shared stages, seed after seed: the runs behind Tables 4, 6 and 12.

    lab = Lab(cfg)                                 # an experiments.tables.TablesConfig
    lab.tune(cells); lab.train("table4", seeds, cells, finish)

Every cell of a seed starts from one stage-2 checkpoint, and cells with the same mask from one
stage-3 checkpoint: WORK/SCALE/seed0/lm, .../hard, .../hard-clr-dhnm, each with the config files
that `train.py` would take. Steps, batches and learning rates are the same in every cell; what is
off gives its steps to the rest. A stage that is finished is skipped, one that was stopped goes on.

UNSPECIFIED: what Table 4's "without SM" does; here the mask opens at the first step of stage 3.
UNSPECIFIED: whether stage 3 has cross-lingual pairs; on the embedded corpus it has none, so that
CLR is all that a model ever learns of a language but English.
DEVIATES: nDCG@10 of retrieval instead of MTEB's averages. A small model that starts as a bag of
words hardly uses attention (config/embed_weak.py), so the one here has the customary start.
"""
import contextlib
import dataclasses
import itertools
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import clr
from tools import sets
import train
from configurator import load_config
from toy.corpus import write_jsonl
from data import load_collection, read_jsonl, text_id
from engine import distributed
from toy.lexicon import LexiconTranslator, Phrasing
from mixture import ensure_docs, load_tokenizer
from train import STAGES, TrainConfig

PRETRAIN, SFT, WEAK, SUP = STAGES
COLUMNS = ("Multi", "Eng", "Zh")
TUNING_SEED = 1000                 # its runs choose the learning rates, on other questions
RATES = {                          # learning rates that are tried; LoRA's as multiples of them
    "toy": {WEAK: (5e-4, 1e-3, 2e-3), SUP: (1.5e-4, 3e-4, 6e-4), "lora": (0.3, 1.0, 3.0)},
    "real": {WEAK: (1.2e-3, 2.5e-3, 5e-3), SUP: (4e-4, 8e-4, 1.6e-3), "lora": (0.3, 1.0, 3.0)}}
TOY = {                            # the embedded corpus on one core: a cell takes half a minute
    "all": {"vocab_size": 8192, "n_layer": 1, "n_embd": 256, "n_head": 4, "n_kv_head": 2,
            "attention_dim": 128, "ffn_dim": 128, "norm_eps": 1e-5, "embed_std": 0.02,
            "embed_rank_power": 0.0, "log_every": 1, "query_len": 20, "passage_len": 32,
            "keep_last": 1},
    PRETRAIN: {"steps": 60, "batch_size": 32, "passage_len": 64, "learning_rate": 3e-4},
    SFT: {"steps": 10, "batch_size": 64, "passage_len": 64, "learning_rate": 1e-4},
    WEAK: {"steps": 120, "batch_size": 128},
    SUP: {"steps": 130, "batch_size": 48, "n_negatives": 3, "pool_size": 50,
          "task_weights": {"retrieval": 1.0, "clr": 1.0}}}
ROWS = 800                         # supervised questions of TOY: each is visited four times
CLR_TIMES = 4                      # languages that each of them is put into


@dataclass(frozen=True)
class Cell:
    """One row of a table: the settings in which its stages 3 and 4 differ from other cells'."""
    schedule: str = "linear"
    mask_axis: str = "row"
    mask_apply: str = "weights"
    lora_rank: int = 0             # 0: all weights
    clr: bool = False
    dhnm: str = "fixed"
    times: int = 1                 # the steps of stage 3

    def changes(self, stage, base):
        """Return the settings of a stage: stage 3 has the mask's, stage 4 the tasks' and DHNM."""
        lora = {"lora_rank": self.lora_rank} if self.lora_rank else {}
        if stage == WEAK:
            return {"schedule": self.schedule, "mask_axis": self.mask_axis,
                    "mask_apply": self.mask_apply, "steps": self.times * base.steps, **lora}
        kept = {k: w for k, w in base.task_weights.items() if k != "clr" or self.clr}
        return {"dhnm": self.dhnm, "task_weights": kept, **lora}

    def folder(self, stage):
        """Name the folder of a stage; cells that share the stage share the folder."""
        mask = [self.schedule] + ["columns"] * (self.mask_axis == "col") \
            + ["logits"] * (self.mask_apply == "logits") + [f"x{self.times}"] * (self.times > 1)
        parts = mask + [f"r{self.lora_rank}"] * bool(self.lora_rank)
        if stage == SUP:
            parts += ["clr"] * self.clr + ["dhnm"] * (self.dhnm == "v2") + ["sup"]
        return "-".join(parts)


def cell(sm, clr=False, dhnm=False, **rest):
    """Return the cell of Table 4 with these parts on."""
    return Cell(schedule="linear" if sm else "hard", clr=clr, dhnm="v2" if dhnm else "fixed",
                **rest)


NONE, FULL = cell(False), cell(True, True, True)


def columns(scores):
    """Return Multi, Eng and Zh, in percent, of what `eval.py` wrote.

    Mean nDCG@10 of all other languages -> English, of English alone, and of Chinese -> English;
    over the collections, where there are several.
    """
    found = {}
    for key, value in scores.items():
        if key.startswith("retrieval/") and key.endswith("-en/ndcg@10"):
            found.setdefault(key.split("/")[2].split("-")[0], []).append(100 * value)
    if not {"en", "zh"} <= found.keys():
        raise ValueError(f"scores of {', '.join(found) or 'no'} languages -> English: en and zh "
                         "are needed")
    foreign = [v for lang, values in found.items() if lang != "en" for v in values]
    return dict(zip(COLUMNS, map(float, (np.mean(foreign), np.mean(found["en"]),
                                         np.mean(found["zh"])))))


# ---------------------------------------------------------------- what the cells read

def toy_data(docs, folder):
    """Make the files of TOY from the embedded corpus; return the settings that name them."""
    ensure_docs(TrainConfig(docs=str(docs)))
    if not (folder / "test" / "qrels.tsv").is_file():
        translate, phrase = LexiconTranslator(), Phrasing()
        rows = list(itertools.islice(read_jsonl(docs / "retrieval.jsonl"), ROWS))
        rng = random.Random(0)
        shares = {lang: share for lang, share in clr.TABLE_7.items() if lang != "en"}
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "retrieval.jsonl", rows)
        write_jsonl(folder / "clr.jsonl", (
            row for seed in range(CLR_TIMES) for row in clr.build_clr(
                rows, lambda text, lang: phrase(translate.words(text, lang), lang, rng),
                shares, seed, gates=[clr.script_gate(0.2), clr.copy_gate])))
        for split in ("dev", "test"):
            many_languages(docs / split, folder / split, translate)
    named = {"text": docs / "text.jsonl", "pairs": docs / "pairs" / "documentation.jsonl",
             "retrieval": folder / "retrieval.jsonl", "clr": folder / "clr.jsonl"}
    return {kind: (str(path),) for kind, path in named.items()}


def many_languages(source, folder, translate, asked=100):
    """Write a collection with all its questions in English and the first `asked` in 25 more."""
    found = load_collection(source)
    queries = [{**row, "lang": "en"} for row in found.queries] + [
        {"id": f"{row['id']}/{lang}", "lang": lang, "text": translate(row["text"], lang)}
        for row in found.queries[:asked] for lang in clr.LANGUAGES if lang != "en"]
    write_collection(folder, [{**row, "lang": "en"} for row in found.corpus], queries,
                     {row["id"]: found.qrels[row["id"].rsplit("/", 1)[0]]
                      if row["lang"] != "en" else found.qrels[row["id"]] for row in queries})


def write_collection(folder, corpus, queries, qrels):
    """Write corpus.jsonl, queries.jsonl, and qrels.tsv last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels.tsv").write_text("".join(
        f"{q['id']}\t{doc}\t{gain}\n" for q in queries for doc, gain in qrels[q["id"]].items()))


def real_data(root, folder):
    """Make the files of a folder of public sets; return the settings that name them.

    The questions of the held-out collections are dealt by hash: half choose learning rates.
    """
    if not root:
        raise ValueError("--scale=real needs --root=FOLDER, a folder of public sets (sets.py)")
    sets.ensure(root, folder / "sets")
    for place in sets.held_out_collections(root):
        found = load_collection(place)
        for split, half in (("dev", 0), ("test", 1)):
            asked = [q for q in found.queries if text_id(q["id"]) % 2 == half]
            if not (folder / split / place.name / "qrels.tsv").is_file():
                write_collection(folder / split / place.name, found.corpus, asked, found.qrels)
    made = {}
    for kind in ("text", "pairs", "retrieval", "clr", "classification", "sts"):
        files = sorted((folder / "sets" / kind).glob("*.jsonl")) \
            or [folder / "sets" / f"{kind}.jsonl"]
        made[kind] = tuple(str(f) for f in files if f.is_file() and f.stat().st_size)
    return made


# ---------------------------------------------------------------- training the cells

class Lab:
    """Train cells in WORK/SCALE and read what came out; every stage is trained once.

    cfg: `experiments.tables.TablesConfig`. Raises ValueError for an unknown scale, or a folder
    whose stages were trained with other settings.
    """

    def __init__(self, cfg):
        if cfg.scale not in RATES:
            raise ValueError(f"scale {cfg.scale!r} is unknown; choose {' or '.join(RATES)}")
        self.work, self.scale = (Path(cfg.work) / cfg.scale).resolve(), cfg.scale
        self.world, self.bar = distributed.start(), None
        toy = cfg.scale == "toy"
        files = toy_data(Path(cfg.docs).resolve(), self.work) if toy else \
            real_data(cfg.root, self.work)
        self.base = {stage: dataclasses.replace(
            TrainConfig(stage=stage, **TOY["all"] | TOY[stage]) if toy else
            load_config(TrainConfig, [f"config/real/{stage}.py"]), previous="", root="", dims=(),
            **files) for stage in STAGES}
        queries = (str(Path(cfg.docs).resolve() / "clr.jsonl"),) if toy else files["clr"]
        load_tokenizer(dataclasses.replace(self.base[PRETRAIN], out=str(self.work), clr=queries),
                       self.world)
        self.rates = {}

    def collections(self, split):
        """Return the folders that are scored: "dev" for learning rates, "test" for tables."""
        return tuple(str(path.parent) for path in sorted(
            (self.work / split).glob("**/qrels.tsv")))

    def config(self, seed, stage, one=None, split="test", **changes):
        """Return the settings of a stage of a cell; `changes` come on top."""
        home = self.work / f"seed{seed}"
        if stage in (PRETRAIN, SFT):
            previous = home / "lm" / f"{PRETRAIN}.py" if stage == SFT else ""
            return dataclasses.replace(self.base[stage], seed=seed, out=str(home / "lm"),
                                       previous=str(previous), **changes)
        before = home / "lm" / f"{SFT}.py" if stage == WEAK else \
            home / one.folder(WEAK) / f"{WEAK}.py"
        own = one.changes(stage, self.base[stage])
        if stage in self.rates:
            own["learning_rate"] = self.rates[stage] * (
                self.rates["lora"] if one.lora_rank else 1)
        if stage == WEAK and one.folder(WEAK) in ("hard", "linear"):    # Sec. 3.2 looks at these
            own |= {"save_every": max(1, self.base[stage].steps // 4), "keep_last": 5}
        return dataclasses.replace(self.base[stage], **{
            "seed": seed, "out": str(home / one.folder(stage)), "previous": str(before),
            "evaluate": self.collections(split), **own, **changes})

    def run(self, cfg):
        """Train a stage unless it is finished; return the folder of its results.

        What train.py prints goes to OUT/STAGE.txt. A signal ends the program when it has saved.
        """
        out, path = Path(cfg.out), Path(cfg.out) / f"{cfg.stage}.py"
        out.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {value!r}" for key, value in dataclasses.asdict(cfg).items()]
        path.write_text("\n".join(['"""Written by experiments/lab.py."""', *lines, ""]),
                        encoding="utf-8")
        share(self.work, out)
        with open(out / f"{cfg.stage}.txt", "a", encoding="utf-8") as told, \
                contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                train.train(cfg, [str(path)], self.world)
            except train.Interrupted as stopped:
                print("stopped by a signal and saved; the same command goes on",
                      file=sys.__stderr__)
                sys.exit(128 + int(str(stopped)))
        if cfg.stage == PRETRAIN:                  # the tokens of the text, the same for all seeds
            share(out, self.work)
        return out / cfg.stage

    def stages(self, seed, cells):
        """Return the settings of all stages that these cells need, each stage once, in order."""
        plan = [self.config(seed, PRETRAIN), self.config(seed, SFT)]
        for one in cells:
            plan += [self.config(seed, WEAK, one), self.config(seed, SUP, one)]
        return list({(cfg.out, cfg.stage): cfg for cfg in plan}.values())

    def tune(self, cells):
        """Choose the learning rates, once for the cell without any part and once for the full one.

        All cells then take the rate whose mean over the two is best. Returns {stage: {cell: {rate:
        score}}}, the scores being the mean of Multi and Eng on the dev questions. LoRA's rate is a
        multiple of it, found for rank 32. Stages whose rates were tried are not tried again.
        """
        tried = {}
        for stage in (PRETRAIN, SFT):
            self.run(self.config(TUNING_SEED, stage))
        for stage in (WEAK, SUP):
            tried[stage] = {label: {rate: self._try(stage, one, rate)
                                    for rate in RATES[self.scale][stage]}
                            for label, one in (("nothing on", NONE), ("all on", FULL))}
            self.rates[stage] = best_of(tried[stage])
        if any(one.lora_rank for one in cells):
            one, scores = dataclasses.replace(FULL, lora_rank=32), {}
            for times in RATES[self.scale]["lora"]:
                self.rates["lora"] = times
                self._try(WEAK, one, self.rates[WEAK] * times)
                scores[times] = self._try(SUP, one, self.rates[SUP] * times,
                                          self.rates[WEAK] * times)
            tried["lora"] = {"rank 32, all on": scores}
            self.rates["lora"] = best_of(tried["lora"])
        return tried

    def _try(self, stage, one, rate, weak_rate=None):
        """Return the dev score of a stage trained at a learning rate, on stage 3 at `weak_rate`."""
        home, changes = self.work / f"seed{TUNING_SEED}", {}
        if stage == SUP:
            rate_3 = weak_rate or self.rates[WEAK]
            changes["previous"] = str(home / f"{one.folder(WEAK)}-lr{rate_3:g}" / f"{WEAK}.py")
        return dev_score(self.run(self.config(
            TUNING_SEED, stage, one, "dev", learning_rate=rate,
            out=str(home / f"{one.folder(stage)}-lr{rate:g}"), **changes)))

    def train(self, name, seeds, cells, finish):
        """Train all cells of all seeds; call finish(seeds so far) after each seed."""
        plans = {seed: self.stages(seed, cells) for seed in seeds}
        left = sum(not is_done(cfg) for plan in plans.values() for cfg in plan)
        with tqdm(total=left, desc=name, unit="stage") as bar:
            for i, (seed, plan) in enumerate(plans.items(), 1):
                for cfg in plan:
                    new = not is_done(cfg)
                    bar.set_postfix_str(f"seed {seed}, {Path(cfg.out).name}/{cfg.stage}", new)
                    self.run(cfg)
                    bar.update(new)
                finish(list(plans)[:i])

    def read(self, seed, one, stage=SUP):
        """Return the columns of a stage of a cell."""
        where = Path(self.config(seed, stage, one).out) / stage / "eval.json"
        return columns(json.loads(where.read_text(encoding="utf-8")))

    def log(self, seed, one, stage=SUP):
        """Return the rows of a stage's log, one for each step."""
        where = Path(self.config(seed, stage, one).out) / stage / "log.jsonl"
        return [json.loads(line) for line in where.read_text(encoding="utf-8").splitlines()]


def share(here, there):
    """Link the tokenizer and the token stream of one folder into another."""
    for path in [here / "tokenizer.tiktoken", *here.glob("tokens-*.bin")]:
        if path.is_file() and not (there / path.name).is_file():
            os.link(path, there / path.name)


def is_done(cfg):
    """Tell whether a stage is finished and scored."""
    return (cfg.run_dir / "eval.json").is_file()


def dev_score(folder):
    """Return the mean of Multi and Eng that a stage was given."""
    found = columns(json.loads((folder / "eval.json").read_text(encoding="utf-8")))
    return (found["Multi"] + found["Eng"]) / 2


def best_of(tried):
    """Return the rate with the best mean over the cells of {cell: {rate: score}}."""
    cells = list(tried.values())
    return max(cells[0], key=lambda rate: sum(scores[rate] for scores in cells))


def seconds(log):
    """Return the seconds of each step of a log."""
    tokens = [0, *(row["tokens"] for row in log)]
    return [(b - a) / row["tokens_per_second"] for a, b, row in zip(tokens, tokens[1:], log)]
