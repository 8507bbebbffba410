"""Do the five exercises of docs/exercises.md and write down what was seen.

    python -m experiments.exercises --mine=FOLDER       # results/exercises.json

It needs a finished default run in out/ and, for the fourth, a folder of one's own data. The fifth,
a language more, trains all four stages in a copy of the project. `--only=schedule,logits` repeats
some exercises and leaves the others as they are recorded.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configurator import load_config
from experiments.cells import STAGES, read_log, read_scores
from experiments.results import write_result

PROJECT = Path(__file__).resolve().parent.parent
WEAK, SUP = STAGES[2:]
NAMES = ("schedule", "logits", "dhnm", "pairs", "language")


@dataclass(frozen=True)
class ExercisesConfig:
    """The settings of `python -m experiments.exercises`."""
    mine: str = ""                 # folder with text.jsonl, pairs/ and test/, for "pairs"
    only: tuple[str, ...] = ()     # of NAMES; empty: all
    results: str = "results"


def run(stage, out, *flags, copied=STAGES[:2], folder=PROJECT):
    """Train a stage into OUT from stages of the default run; return the stage's folder."""
    out = Path(folder) / out
    shutil.rmtree(out, ignore_errors=True)
    for name in copied:
        shutil.copytree(PROJECT / "out" / name, out / name)
    words = [sys.executable, "train.py", f"config/{stage}.py", *flags, f"--out={out}"]
    print(" ".join(words), flush=True)
    subprocess.run(words, cwd=folder, check=True)
    return out / stage


def ndcg(folder, subset="test"):
    """Return nDCG@10 of a stage on a collection, or on a pair of languages ("xx-en")."""
    return next(value for key, value in read_scores(folder).items()
                if key.startswith("retrieval/") and key.endswith(f"/{subset}/ndcg@10"))


def mean(log, key, first=0.0, last=1.0):
    """Return the mean of a key of a log over a part of its rows, those that have it."""
    rows = [row[key] for row in log if key in row]
    part = rows[int(first * len(rows)):max(int(last * len(rows)), 1)]
    return sum(part) / len(part)


def masks(cfg, flag):
    """Exercises 1 and 2: another schedule, or multiplied logits, beside the default run."""
    rows = []
    for label, folder in (("default", PROJECT / "out" / WEAK), (flag, run(
            WEAK, f"out/exercise{flag.partition('=')[0]}", flag))):
        log = read_log(folder)
        rows.append({"": label, "alpha half-way": log[len(log) // 2]["alpha"],
                     "loss, first tenth": mean(log, "loss", 0, 0.1),
                     "loss, last tenth": mean(log, "loss", 0.9), "nDCG@10": ndcg(folder)})
    return rows


def dhnm(cfg):
    """Exercise 3: hard negatives that stay, against hard negatives that are replaced."""
    rows = []
    for policy in ("fixed", "v2"):
        folder = run(SUP, f"out/exercise-{policy}", "--task_weights=retrieval:1",
                     f"--dhnm={policy}", copied=STAGES[:3])
        log = read_log(folder)
        rows.append({"": policy, "S_0, last fifth": mean(log, "S_0", 0.8),
                     "S, last fifth": mean(log, "S", 0.8), "loss, last fifth": mean(
                         log, "loss", 0.8), "replaced a step": mean(log, "replaced", 0.2),
                     "nDCG@10": ndcg(folder)})
    return rows


def pairs(cfg):
    """Exercise 4: pairs of one's own, from the first stage on."""
    if not Path(cfg.mine, "pairs").is_dir():
        raise ValueError(f"--mine={cfg.mine}: a folder with text.jsonl, pairs/ and test/ is needed")
    folder = run(WEAK, "out/exercise-mine", f"--data={Path(cfg.mine).resolve()}", copied=())
    summary = json.loads((folder.parent / "summary.json").read_text("utf-8"))
    return [{"": label, "nDCG@10": next(v for k, v in scores.items()
                                        if k.endswith("/test/ndcg@10"))}
            for label, scores in summary.items() if label == "BM25" or label in STAGES]


def language(cfg):
    """Exercise 5: English backwards as a language of its own, in a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns("out", ".git", "__pycache__")
        shutil.copytree(PROJECT, copy, ignore=ignored)
        add_language(copy)
        sup = run(SUP, "out", copied=(), folder=copy)
        return [{"": f"after {stage}", **{f"{lang}-en": ndcg(sup.parent / stage, f"{lang}-en")
                                          for lang in ("xx", "zh")}} for stage in (WEAK, SUP)]


def add_language(project):
    """Add English backwards, "xx", to the lexicon and to Table 7 of a copy of the project."""
    path = project / "toy" / "lexicon.tsv"
    rows = [line.split("\t") for line in path.read_text("utf-8").split("\n") if line]
    rows = [[*row, "xx" if i == 0 else row[0][::-1]] for i, row in enumerate(rows)]
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n", "utf-8")
    with open(project / "toy" / "phrasing.tsv", "a", encoding="utf-8") as file:
        file.write("xx\t{} tahw\teht fo\t\t\n")
    source = (project / "clr.py").read_text("utf-8")
    for name, entry in (("LANGUAGES", '"xx": "Backwards"'), ("TABLE_7", '"xx": 12')):
        if f"\n{name} = {{" not in source:
            raise ValueError(f"clr.py has no line \"{name} = {{\" to add a language to")
        source = source.replace(f"\n{name} = {{", f"\n{name} = {{{entry}, ", 1)
    (project / "clr.py").write_text(source, "utf-8")


def main(argv=None):
    """Do the exercises that are asked for, and write the file after each."""
    cfg = load_config(ExercisesConfig, argv)
    if set(cfg.only) - set(NAMES):
        raise ValueError(f"only {cfg.only}: the exercises are {', '.join(NAMES)}")
    path = Path(cfg.results) / "exercises.json"
    tables = json.loads(path.read_text("utf-8"))["tables"] if path.is_file() else {}
    work = {"schedule": lambda: masks(cfg, "--schedule=accelerating"),
            "logits": lambda: masks(cfg, "--mask_apply=logits"), "dhnm": lambda: dhnm(cfg),
            "pairs": lambda: pairs(cfg), "language": lambda: language(cfg)}
    for name in cfg.only or NAMES:
        tables[name] = work[name]()
        write_result(cfg.results, "exercises", {"title": "Exercises", "tables": tables,
                                                "notes": ["One seed: a direction at most."]})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"experiments.exercises: error: {error}")
