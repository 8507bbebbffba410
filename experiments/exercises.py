"""Do the README's five exercises and write down what was seen.

    python -m experiments.exercises --mine=FOLDER --out=results/exercises.json   # some ten minutes

It needs a finished default run in out/ and, for the fourth, a folder of pairs of one's own:
mine.jsonl (pairs), mine_text.jsonl (text) and the collection mine_test. The fifth, a language more,
is done in a copy of the project. `--only=schedule,logits` does some again and keeps the others.
"""
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from configurator import load_config
from eval import evaluate_collection
from tasks import LexicalBaseline

PROJECT = Path(__file__).resolve().parent.parent
TEST, CLR_TEST = "out/installed_docs/test", "out/docs_xx/clr_test"
COMMANDS = {
    "schedule": "config/embed_weak.py --steps=80 --schedule=accelerating --out=out/acc",
    "linear": "config/embed_weak.py --steps=80 --out=out/linear",
    "logits": "config/embed_weak.py --steps=80 --mask_apply=logits --out=out/logits",
    "fixed": "config/embed_sup.py --steps=100 --task_weights=retrieval:1 --dhnm=fixed "
             "--log_every=2 --out=out/fixed",
    "v2": "config/embed_sup.py --steps=100 --task_weights=retrieval:1 --dhnm=v2 --log_every=2 "
          "--out=out/v2",
    "pairs": "config/embed_weak.py --pairs=mine.jsonl --text=mine_text.jsonl --steps=60 "
             "--batch_size=64 --evaluate=mine_test --out=out/mine",
    "language": "config/embed_weak.py --docs=out/docs_xx --steps=150 --out=out/xx",
}


@dataclass(frozen=True)
class ExercisesConfig:
    """The settings of `python -m experiments.exercises`."""
    mine: str = ""                 # folder with mine.jsonl, mine_text.jsonl, mine_test
    only: tuple[str, ...] = ()     # schedule, logits, dhnm, pairs, language; empty: all
    out: str = "results/exercises.json"


def run(name, folder, *more, keep=("pretrain", "sft")):
    """Run a command of `COMMANDS` in a project folder; return (its log, its scores)."""
    words = shlex.split(COMMANDS[name])
    out = folder / next(word for word in words if word.startswith("--out=")).removeprefix("--out=")
    if keep:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        shutil.copy(PROJECT / "out" / "tokenizer.tiktoken", out)
        for stage in keep:
            shutil.copytree(PROJECT / "out" / stage, out / stage)
    print(f"python train.py {COMMANDS[name]}", flush=True)
    subprocess.run([sys.executable, "train.py", *words, *more], cwd=folder, check=True)
    stage = Path(words[0]).stem
    log = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
    return log, {s.name: json.loads((s / "eval.json").read_text())
                 for s in out.iterdir() if (s / "eval.json").is_file()}


def ndcg(scores, place="installed_docs/test"):
    """Return nDCG@10 of a collection."""
    return scores[f"retrieval/{place}/ndcg@10"]


@cache
def linear_run():
    """Return the log and the scores of the short stage 3 that the first two are compared with."""
    return run("linear", PROJECT, f"--evaluate={TEST}", "--log_every=2")


def masks(which):
    """Exercises 1 and 2: what another schedule, or multiplied logits, do to a short stage 3."""
    linear, linear_scores = linear_run()
    log, scores = run(which, PROJECT, f"--evaluate={TEST}", "--log_every=2")
    ours, before = ndcg(scores["embed_weak"]), ndcg(linear_scores["embed_weak"])
    at = {row["step"]: row for row in log}
    if which == "schedule":
        return {"alpha_at_step_40": at[40]["alpha"], "ndcg@10": ours, "ndcg@10_linear": before}
    losses = [sum(row["loss"] for row in rows if 41 <= row["step"] <= 60) / 10
              for rows in (log, linear)]
    return {"loss_of_steps_41_to_60": losses[0], "loss_of_steps_41_to_60_weights": losses[1],
            "ndcg@10": ours, "ndcg@10_weights": before}


def dhnm():
    """Exercise 3: hard negatives that stay, against hard negatives that are replaced."""
    found = {key: {} for key in ("S_from_step_94", "S_0_from_step_94", "loss_from_step_90",
                                 "replaced_in_steps_50_to_98", "ndcg@10")}
    for policy in ("fixed", "v2"):
        log, scores = run(policy, PROJECT, f"--evaluate={TEST}",
                          keep=("pretrain", "sft", "embed_weak"))
        late = [row for row in log if row["step"] >= 94]
        replaced = [row["replaced"] for row in log if 50 <= row["step"] <= 98]
        last = [row["loss"] for row in log if row["step"] >= 90]
        for key, value in zip(found, (
                sum(row["S"] for row in late) / len(late),
                sum(row["S_0"] for row in late) / len(late), sum(last) / len(last),
                [min(replaced), max(replaced)], ndcg(scores["embed_sup"]))):
            found[key][policy] = value
    return found


def pairs(mine):
    """Exercise 4: pairs of one's own, from the first stage on."""
    for name in ("mine.jsonl", "mine_text.jsonl", "mine_test"):
        (PROJECT / name).unlink(missing_ok=True)
        (PROJECT / name).symlink_to(Path(mine).resolve() / name)
    shutil.rmtree(PROJECT / "out" / "mine", ignore_errors=True)
    try:
        scores = run("pairs", PROJECT, keep=())[1]
        lexical = evaluate_collection(LexicalBaseline(), PROJECT / "mine_test")
    finally:
        for name in ("mine.jsonl", "mine_text.jsonl", "mine_test"):
            (PROJECT / name).unlink()
    return {"ndcg@10": {stage: ndcg(scores[stage], "mine_test/all") for stage in
                        ("pretrain", "embed_weak")} | {"BM25": ndcg(lexical, "mine_test/all")}}


def language():
    """Exercise 5: English backwards as a language of its own, in a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
        table = [line.split("\t") for line in (copy / "toy" / "lexicon.tsv").read_text("utf-8").split("\n")
                 if line]
        (copy / "toy" / "lexicon.tsv").write_text("\n".join("\t".join(
            [*row, "xx" if i == 0 else row[0][::-1]]) for i, row in enumerate(table)) + "\n",
            "utf-8")
        with open(copy / "toy" / "phrasing.tsv", "a", encoding="utf-8") as file:
            file.write("xx\t{} tahw\teht fo\t\t\n")
        source = (copy / "clr.py").read_text("utf-8")
        source = source.replace("LANGUAGES = {", 'LANGUAGES = {"xx": "Backwards", ', 1)
        (copy / "clr.py").write_text(source.replace("TABLE_7 = {", 'TABLE_7 = {"xx": 12, ', 1),
                                     "utf-8")
        scores = run("language", copy)[1]["embed_weak"]
        subprocess.run([sys.executable, "eval.py", "--checkpoint=out/xx/sft",
                        f"--retrieval={CLR_TEST}", "--out=before.json"], cwd=copy, check=True)
        before = json.loads((copy / "before.json").read_text())
    return {key: {f"{lang}-en": ndcg(found, f"clr_test/{lang}-en") for lang in ("xx", "zh")}
            for key, found in (("ndcg@10", scores), ("ndcg@10_before", before))}


def main(argv=None):
    """Do the exercises that are asked for, and write the file after each."""
    cfg = load_config(ExercisesConfig, argv)
    path = Path(cfg.out)
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, work in {"schedule": lambda: masks("schedule"), "logits": lambda: masks("logits"),
                       "dhnm": dhnm, "pairs": lambda: pairs(cfg.mine),
                       "language": language}.items():
        if not cfg.only or name in cfg.only:
            command = COMMANDS["fixed" if name == "dhnm" else name]
            found[name] = {"command": f"python train.py {command}", **work()}
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
