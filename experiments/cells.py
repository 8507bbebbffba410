"""Train the cells of a table on shared stages, seed after seed, and measure them.

    WORK/data                       the questions of stage 4, few enough to be visited six times
    WORK/lm0-1500/{pretrain,sft}    the language model of LM seed 0, 1,500 steps of stage 1
    WORK/seed3/linear/embed_weak    stage 3 of seed 3, on the language model of 3 % lm_seeds
    WORK/seed3/linear-clr=True/embed_sup   stage 4 on that stage 3

Each stage is `train.main([FILE])` with a config file of its own, written beside its results.
A finished stage is not repeated, an interrupted one resumes. Cells that differ in stage 4 share
stage 3. Steps, batches and learning rates are equal in all cells, but where a label or a note says
otherwise.

UNSPECIFIED: Table 4's "without SM"; here the mask opens at the first step of stage 3.
DEVIATES: nDCG@10 of retrieval instead of MTEB's averages.
"""
import contextlib
import dataclasses
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from data import parse_pair, sources
from embed import Embedder
from engine.collection import load_collection
from engine.jsonl import atomic, read_jsonl, read_object, write_jsonl
from engine.run import chain
from eval import evaluate
from experiments import probes
from experiments.runs import read_scores, score_of, write_result
from toy import build as toy
from toy.lexicon import LexiconTranslator, Phrasing
from train import STAGES, TrainConfig

PRETRAIN, SFT, WEAK, SUP = STAGES
ROWS = 800                         # supervised questions: few enough to be visited six times
TUNING_SEED = 1000                 # its runs choose the learning rates, on the dev questions
RATES = (0.5, 1.0, 2.0)            # multiples of the config's learning rate that are tried
TWO = ("de", "zh")                 # languages of questions among the pairs of stage 3
LORA_RATES = (0.3, 1.0, 3.0)       # multiples of the chosen rate, for LoRA of rank 32


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
    weak_rate: float = 0.0         # learning rate of stage 3; 0: the tuned one
    weak_clr: str = ""             # CLR's rows among stage 3's pairs: all, few, wrong or two
    clr: bool | str = False        # "wrong": by a dictionary whose words have changed places
    dhnm: str = "fixed"
    sup_rate: float = 0.0          # learning rate of stage 4; 0: the tuned one

    def folder(self, stage):
        """Name the folder of a stage; cells that share the stage share the folder."""
        of_stage_4 = ("clr", "dhnm", "sup_rate")
        return "-".join([self.schedule, *(
            f"{key}={value}" for key, value in dataclasses.asdict(self).items()
            if key != "schedule" and value != getattr(Cell, key)
            and (stage == SUP or key not in of_stage_4))])


def table4_cell(sm, clr, dhnm, **rest):
    """Return the cell of Table 4 with these parts on."""
    return Cell("linear" if sm else "hard", clr=bool(clr), dhnm="v2" if dhnm else "fixed", **rest)


NOTHING, EVERYTHING = table4_cell(0, 0, 0), table4_cell(1, 1, 1)


def build_data(folder, source):
    """Write stage 4's files into `folder`; return {kind: files} of the settings.

    source: a folder in the layout of train.py's `data`. Text and pairs are its own. Retrieval is
    its first `ROWS` questions, CLR the translations of these.
    """
    if source.name == "installed_docs":
        toy.ensure(source)
    files = {kind: (str(folder / f"{kind}.jsonl"),) for kind in ("retrieval", "clr")}
    if not (folder / "clr.jsonl").is_file():
        rows = list(read_jsonl(source / "retrieval.jsonl"))[:ROWS]
        answers = {text for row in rows for text in parse_pair(row)["pos"]}
        translated = [row for row in read_jsonl(source / "clr.jsonl")
                      if set(parse_pair(row)["pos"]) & answers]
        if not translated:
            raise ValueError(f"{source / 'clr.jsonl'}: no row translates a question of "
                             f"{source / 'retrieval.jsonl'}")
        write_jsonl(folder / "retrieval.jsonl", rows)
        write_jsonl(folder / "clr.jsonl", translated)
    base = TrainConfig(data=str(source))
    return {kind: sources(base, kind) for kind in ("text", "pairs")} | files


def repeat(path, few, rows):
    """Write the rows of the file `few` over and over, as many as the file `rows` has."""
    if not path.is_file():
        count = sum(1 for _ in read_jsonl(rows))
        write_jsonl(path, itertools.islice(itertools.cycle(list(read_jsonl(few))), count))
    return path


def write_clr(path, clr, pairs, how):
    """Write the rows of the file `clr` anew; return `path`. The files `pairs` have their questions.

    how: "wrong": by a dictionary whose words have changed places. Questions, languages and forms of
    phrasing are the same; what a word means is lost. "two": by the right one, German and Chinese by
    turns.
    """
    if path.is_file():
        return path
    translate, phrase, rng = LexiconTranslator(), Phrasing(), random.Random(0)
    if how == "wrong":
        for lang, words in translate.table.items():
            if lang != "en":
                others = list(words.values())
                rng.shuffle(others)
                translate.table[lang] = dict(zip(words, others))
    english = {pair["pos"][0]: pair["query"] for file in reversed(pairs)
               for pair in map(parse_pair, read_jsonl(file))}
    rows = list(read_jsonl(clr))
    if lost := [row for row in rows if row["pos"][0] not in english]:
        raise ValueError(f"{clr}: {len(lost)} rows translate no question of {', '.join(pairs)}")
    if how == "two":
        rows = [{**row, "lang": lang} for row, lang in zip(rows, itertools.cycle(TWO))]
    write_jsonl(path, ({**row, "query": phrase(translate.words(
        english[row["pos"][0]], row["lang"]), row["lang"], rng)} for row in rows))
    return path


def columns(scores):
    """Return {"Multi", "Eng", "Zh"} in percent, from what train.py wrote of dev or of test.

    Eng is nDCG@10 of all English questions. The others are of the questions that every language
    has, on English passages: the mean over all languages but English, and Chinese.
    """
    foreign = {key.split("/")[2].split("-")[0]: 100 * value for key, value in scores.items()
               if key.startswith("retrieval/clr_") and key.endswith("-en/ndcg@10")}
    foreign.pop("en", None)
    english = [score_of(scores, "retrieval/", f"/{split}/ndcg@10") for split in ("test", "dev")]
    english = [value for value in english if value is not None]
    if "zh" not in foreign or not english:
        raise ValueError(f"scores of {', '.join(foreign) or 'no'} languages -> English: zh and a "
                         "collection of English questions are needed")
    return {"Multi": float(np.mean(list(foreign.values()))), "Eng": 100 * english[0],
            "Zh": foreign["zh"]}


# ---------------------------------------------------------------- training and measuring

class Lab:
    """Train cells in WORK and measure their checkpoints; every stage is trained once.

    cfg: experiments.ablation.AblationConfig. Raises ValueError for a folder whose stages were
    trained with other settings.
    """

    def __init__(self, cfg):
        self.cfg, self.work = cfg, Path(cfg.work).resolve()
        files = build_data(self.work / "data", Path(cfg.data).resolve())
        steps = {PRETRAIN: cfg.lm_steps, WEAK: cfg.weak_steps, SUP: cfg.sup_steps}
        changes = {SUP: {"task_weights": {"retrieval": 1.0, "clr": 1.0}, "pool_size": 50,
                         "dims": ()}}
        self.base = {}
        for stage in chain(TrainConfig, [f"{cfg.config}/{SUP}.py"]):
            self.base[stage.stage] = dataclasses.replace(
                stage, data=cfg.data, evaluate=(), log_every=1,
                steps=steps.get(stage.stage) or stage.steps, **files,
                **changes.get(stage.stage, {}))
        path = self.work / "rates.json"
        self.tuned = read_object(path) if path.is_file() else {"rates": {}, "tried": {}}

    def lm_folder(self, seed, cell):
        """Return the folder of stages 1 and 2 of a cell."""
        steps = self.base[PRETRAIN].steps if cell.lm_steps is None else cell.lm_steps
        return self.work / f"lm{seed % self.cfg.lm_seeds}-{steps}"

    def rate(self, stage, cell):
        """Return the learning rate of a stage 3 or 4: the cell's own, or the tuned one."""
        rates = self.tuned["rates"]
        times = rates.get("lora", 1.0) if cell.lora_rank else 1.0
        own = cell.weak_rate if stage == WEAK else cell.sup_rate
        return own or times * rates.get(stage, self.base[stage].learning_rate)

    def settings(self, seed, stage, cell):
        """Return the `TrainConfig` of a stage of a cell."""
        base, lm = self.base[stage], self.lm_folder(seed, cell)
        if stage in (PRETRAIN, SFT):
            own = {"seed": seed % self.cfg.lm_seeds, "out": str(lm)}
            if stage == SFT:
                return dataclasses.replace(base, **own, previous=str(lm / f"{PRETRAIN}.py"))
            return dataclasses.replace(base, **own, previous="", **shorter(base, cell.lm_steps))
        home, split = self.work / f"seed{seed}", "dev" if seed == TUNING_SEED else "test"
        own = {key: getattr(cell, key) for key in (
            "schedule", "mask_axis", "mask_apply", "pooling", "lora_rank")}
        own |= {"seed": seed, "learning_rate": self.rate(stage, cell),
                "out": str(home / cell.folder(stage)),
                "evaluate": tuple(f"{self.cfg.data}/{name}" for name in (split, f"clr_{split}"))}
        if stage == WEAK:
            steps = cell.weak_steps or base.steps
            if cell.weak_clr:
                more = f"{self.cfg.data}/clr.jsonl"
                path = self.work / "data" / f"clr_weak_{cell.weak_clr}.jsonl"
                if cell.weak_clr == "few":             # stage 4's, as often as all together
                    more = repeat(path, base.clr[0], more)
                elif cell.weak_clr != "all":
                    more = write_clr(path, more, base.pairs, cell.weak_clr)
                own["pairs"] = (*base.pairs, str(more))
            own |= {"previous": "" if cell.lm_steps == 0 else str(lm / f"{SFT}.py"),
                    "steps": steps, "save_every": (steps + 1) // 2}
        else:
            weights = {k: w for k, w in base.task_weights.items() if k != "clr" or cell.clr}
            if cell.clr == "wrong":
                data = self.work / "data"
                own["clr"] = (str(write_clr(data / "clr_wrong.jsonl", *base.clr, base.retrieval,
                                            "wrong")),)
            own |= {"dhnm": cell.dhnm, "task_weights": weights,
                    "previous": str(home / cell.folder(WEAK) / f"{WEAK}.py")}
        return dataclasses.replace(base, **own)

    def train(self, seed, stage, cell):
        """Train a stage of a cell unless it is finished; return its folder.

        What train.py prints goes to OUT/STAGE.txt.
        """
        stages = [s for s in STAGES[:STAGES.index(stage) + 1]
                  if cell.lm_steps != 0 or s in (WEAK, SUP)]
        configs = [self.settings(seed, s, cell) for s in stages]
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
        "Rank" (effective rank of the dev documents' embeddings).
        """
        path, scores = Path(folder) / "measures.json", read_scores(folder)
        values = read_object(path) if path.is_file() else {}
        embedder = None
        for name, work in self.probes().items():
            if name not in values:
                embedder = embedder or Embedder(folder)
                values[name] = work(embedder)
                write_result(folder, "measures", values)
        return columns(scores) | values

    def probes(self):
        """Return {column: function of an embedder -> number}."""
        cfg, dev = self.cfg, load_collection(f"{self.cfg.data}/dev")
        triplets = probes.order_triplets(dev)
        texts = [row["text"] for row in dev.corpus]
        work = {"Order": lambda e: 100 * probes.preference(e, triplets),
                "First third": lambda e: 100 * probes.long_passages(e, dev, 0),
                "Last third": lambda e: 100 * probes.long_passages(e, dev, 2),
                "Numbers": lambda e: 100 * probes.number_gap(e),
                "Rank": lambda e: probes.embedding_rank(e, texts),
                "LM loss": lambda e: probes.lm_loss(e, texts)}
        if cfg.pawsx:
            work["PAWS-X"] = lambda e: mean_score(e, "pair_classification", cfg.pawsx, "ap")
        if cfg.sts:
            work["STS"] = lambda e: mean_score(e, "sts", cfg.sts, "spearman")
        return work

    def tune(self, stage=SUP, with_lora=False):
        """Choose the learning rates of stages 3 and 4 on the dev questions; all cells take them.

        Each is the best by Multi and Eng over two cells: nothing on, and everything on. LoRA's is a
        multiple of it, chosen at rank 32. stage: the last one that is tuned. WORK/rates.json keeps
        the rates, and what each of them scored.
        """
        def choose(name, trials):
            if name not in self.tuned["rates"]:
                tried = {str(value): [self.score_on_dev(stage, cell) for cell in cells]
                         for value, (stage, *cells) in trials.items()}
                self.tuned["tried"][name] = tried
                self.tuned["rates"][name] = float(max(tried, key=lambda x: sum(tried[x])))
                write_result(self.work, "rates", self.tuned)
            return self.tuned["rates"][name]

        def both(stage, **rates):
            return stage, *(dataclasses.replace(cell, **rates) for cell in (NOTHING, EVERYTHING))

        base = {stage: self.base[stage].learning_rate for stage in (WEAK, SUP)}
        weak = choose(WEAK, {x * base[WEAK]: both(WEAK, weak_rate=x * base[WEAK]) for x in RATES})
        if stage == WEAK:
            return
        sup = choose(SUP, {x * base[SUP]: both(SUP, weak_rate=weak, sup_rate=x * base[SUP])
                           for x in RATES})
        if with_lora:
            choose("lora", {x: (SUP, dataclasses.replace(
                EVERYTHING, lora_rank=32, weak_rate=x * weak, sup_rate=x * sup))
                for x in LORA_RATES})

    def score_on_dev(self, stage, cell):
        """Return the mean of Multi and Eng on the dev questions after a stage."""
        scores = columns(read_scores(self.train(TUNING_SEED, stage, cell)))
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
    with atomic(path) as file:
        file.write(text)


def mean_score(encoder, task, path, metric):
    """Return the mean over languages, in percent, of a metric of one file."""
    scores = evaluate(encoder, task, path)
    return 100 * (score_of(scores, f"{task}/", f"/mean/{metric}") or
                  score_of(scores, f"{task}/", f"/{metric}"))
