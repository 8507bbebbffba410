"""The paper's tables of MTEB's scores, size and speed, and its probe; nothing is trained here.

    python -m experiments.tables table1                              # the default run in out/
    python -m experiments.tables table5 --sentence_transformer=NAME  # a stock model beside it
    python -m experiments.tables table14 --root=FOLDER --out=out/real   # a run on public sets

Table 1, 2, 14, 15: MTEB's columns over local sets (columns.py), and mteb's own numbers where
eval.py has put them into eval.json. Table 5: size, speed. Appendix B: numbers.py. What a system is
scored on is kept in OUT/scores.json, so an interrupted table goes on. The paper's rows are those of
paper.py. DEVIATES: sets, languages and machine are not the paper's; notes say what stands in.
"""
import time
from functools import cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
from embed import Embedder
from eval import HELD_OUT, TABLE_1
from experiments import layout, numbers, paper
from experiments.columns import Kept, by_column, identity_of, local_sets, mean, score
from experiments.runs import Missing, Run
from mixture import sources
from tools.sets import is_for_evaluation
from train import STAGES

SUP = STAGES[-1]
OURS, PAPERS = "nanoConan", "Conan-embedding-v2"
BENCHMARKS = {"en": "MTEB(eng, v1)", "zh": "MTEB(cmn, v1)"}
TAUGHT = {                         # rows of stage 4 that teach a column's task
    "Class.": {"classification"}, "Clust.": {"classification"}, "PairClass": {"sts", "retrieval"},
    "Rerank": {"retrieval", "clr"}, "Retri": {"retrieval", "clr"}, "STS": {"sts"}}
TIMED = 5                          # times that the queries of Table 5 are encoded


# ---------------------------------------------------------------- who is scored

class System:
    """A model of the tables, loaded when it is first asked for."""

    def __init__(self, label, load, run=None, stage=None, scores=None):
        self.label, self.load, self.run, self.stage = label, load, run, stage
        self.scores_path = scores              # what eval.py wrote about it

    @cached_property
    def model(self):
        """Return the encoder itself."""
        return self.load()

    @cached_property
    def encoder(self):
        """Return the encoder that remembers what it has embedded."""
        lexical = isinstance(self.model, tasks.LexicalBaseline)
        return self.model if lexical else tasks.CachedEncoder(self.model)

    @cached_property
    def identity(self):
        """Return what its kept scores are found by."""
        return identity_of(self.model)

    def recorded(self):
        """Return the flat scores that eval.py has written about this model, {} if none."""
        return layout.read(self.scores_path) if self.scores_path else {}


def systems(cfg, stages=(SUP,)):
    """Return the `System`s of a table: BM25, stock models, and the runs after the given stages."""
    found = [System("BM25", tasks.LexicalBaseline)]
    for name in cfg.sentence_transformer:
        label = Path(name).name
        found.append(System(label, partial(tasks.SentenceTransformerBaseline, name),
                            scores=Path("out") / f"eval_{label}.json"))
    for folder in cfg.out:
        for stage in stages:
            run = Run(folder)
            run.config(stage)                                          # raises Missing
            label = OURS if len(cfg.out) == 1 else f"{OURS} ({folder})"
            label += f", stage {STAGES.index(stage) + 1}" if len(stages) > 1 else ""
            found.append(System(label, partial(Embedder, run.folder / stage), run, stage,
                                run.folder / stage / "eval.json"))
    return found


def kept(cfg):
    """Return the scores that are there already."""
    return Kept(Path(cfg.out[0]) / "scores.json")


# ---------------------------------------------------------------- Tables 1, 2, 14, 15: MTEB

def scored_sets(cfg, lang, found):
    """Return ([LocalSet], {system's label: [(LocalSet, percentage or None)]})."""
    docs = Path(Run(cfg.out[0]).settings(SUP).docs)
    if not cfg.root and not (docs / "clr_test" / "qrels.tsv").is_file():
        raise Missing(f"{docs} is missing; make it by: {Run(cfg.out[0]).command(SUP)}")
    items, kept_ = local_sets(docs, cfg.root, lang), kept(cfg)
    bar = tqdm(total=len(items) * len(found), desc=f"sets, {lang}", unit="set", disable=None)
    rows = {system.label: [] for system in found}
    for system in found:
        for item in items:
            rows[system.label].append((item, score(system.encoder, item, kept_, system.identity)))
            bar.update()
    bar.close()
    return items, rows


def mteb_means(system, lang):
    """Return {column: percentage} of a benchmark that eval.py has run through mteb, {} if none."""
    flat, name = system.recorded(), BENCHMARKS[lang]
    means = {column: flat.get(f"mteb/{name}/{kind}/mean") for column, kind in TABLE_1.items()}
    return {column: 100 * value for column, value in means.items() if value is not None}


def mteb_task(system, task, lang):
    """Return the percentage of one of mteb's tasks in a language, None if it has not been run."""
    subsets = {key.split("/")[2]: 100 * value for key, value in system.recorded().items()
               if key.startswith(f"mteb/{task}/") and ":" not in key}
    own = [subsets[name] for name in (lang, f"{lang}-{lang}", f"{lang}-CN", *HELD_OUT)
           if name in subsets]
    return own[0] if own else None


def sets_note(cfg, lang, items):
    """Say which local sets stand behind the columns, and which command gives mteb's own numbers."""
    language = {"en": "English", "zh": "Chinese"}[lang]
    columns = {}
    for item in items:
        columns.setdefault(item.name, []).append(item.column)
    made = "; ".join(f"{name} ({', '.join(own)})" for name, own in columns.items())
    return (f"Local sets, {language}: {made}. Cells of mteb's own sets are filled by `python "
            f"eval.py --checkpoint={Path(cfg.out[0]) / SUP} --mteb=\"{BENCHMARKS[lang]}\"`, which "
            "downloads them (`--sentence_transformer=NAME` for a stock model)")


def table1(cfg):
    """Write Table 1: MTEB's columns in English and Chinese."""
    rows, notes, found = [], [], systems(cfg)
    for lang, language in (("en", "English"), ("zh", "Chinese")):
        rows += [{"Languages": row.pop("Languages"), "Source": "paper", **row}
                 for row in paper.rows(paper.TABLE_1) if row["Languages"] == language]
        items, scored = scored_sets(cfg, lang, found)
        rows += [{"Languages": language, "Source": "local sets", "Model": system.label,
                  **by_column(scored[system.label])} for system in found]
        rows += [{"Languages": language, "Source": "mteb", "Model": system.label, **means}
                 for system in found if (means := mteb_means(system, lang))]
        notes.append(sets_note(cfg, lang, items))
    notes += ["Compare rows of one source. Avg. is over sets, and empty where one has no score: "
              "BM25 has no vectors to classify or cluster",
              "Summ. of local sets is empty, as none has graded summaries; `python eval.py "
              "--summarization=FILE` scores one"]
    return layout.write(cfg, "table1", "Table 1: MTEB's columns, in percent", rows, notes)


def unseen(run, items):
    """Return the share of sets that stage 4 had no rows of, as Table 2 prints it.

    A set is seen if rows of its task were trained on and, where the run was trained on a folder of
    sets, it is one of them.
    """
    cfg = run.settings(SUP)
    kinds = {kind for kind, weight in cfg.task_weights.items() if weight > 0 and sources(cfg, kind)}

    def is_seen(item):
        folder = Path(cfg.root) / item.name
        there = not cfg.root or folder.is_dir() and not is_for_evaluation(folder)
        return there and bool(TAUGHT.get(item.column, set()) & kinds)

    return f"{100 * sum(not is_seen(item) for item in items) / len(items):.0f}%"


def table2(cfg):
    """Write Table 2: MTEB English with a supervised stage that saw some of the sets only."""
    zero = Run(cfg.zero_shot)
    try:
        zero.config(SUP)
    except Missing:
        base = Path(cfg.out[0])
        copies = " ".join(str(base / name) for name in ("tokenizer.tiktoken", *STAGES[:3]))
        train = f"python train.py config/{'real/' if cfg.root else ''}embed_sup.py"
        train += " --root=FOLDER_WITH_THE_ALLOWED_SETS" if cfg.root else ""
        raise Missing(f"{zero.folder / SUP} has no checkpoint; make it by: mkdir -p {zero.folder} "
                      f"&& cp -r {copies} {zero.folder} && {train} "
                      f"--task_weights=retrieval:2,clr:3 --out={zero.folder}") from None
    found = systems(cfg) + [System(f"{OURS}, zero-shot", partial(Embedder, zero.folder / SUP),
                                   zero, SUP, zero.folder / SUP / "eval.json")]
    items, scored = scored_sets(cfg, "en", found)
    rows = [{"Model": row.pop("Model"), "Source": "paper", **row}
            for row in paper.rows(paper.TABLE_2)]
    for system in found:
        seen = unseen(system.run, items) if system.run else None
        rows.append({"Model": system.label, "Source": "local sets", "Zero-shot": seen,
                     **by_column(scored[system.label])})
        if means := mteb_means(system, "en"):
            rows.append({"Model": system.label, "Source": "mteb", **means})
    weights = ", ".join(f"{k} {v:g}" for k, v in zero.settings(SUP).task_weights.items())
    return layout.write(cfg, "table2", "Table 2: MTEB English, zero-shot, in percent", rows, [
        sets_note(cfg, "en", items),
        "Zero-shot is the share of unseen tasks; here: of local sets for whose task stage 4 had no "
        f"rows. The zero-shot run's task weights: {weights}"])


def by_task_table(cfg, name, lang, printed, average, title, *more):
    """Write Table 14 or 15: every task of mteb, then every local set; more: notes."""
    found = systems(cfg)
    items, scored = scored_sets(cfg, lang, found)
    theirs = paper.rows(printed)
    rows = [{"Source": "mteb", **row, **{s.label: mteb_task(s, row["Task"], lang) for s in found}}
            for row in theirs]
    whole = {s.label: mean([row[s.label] for row in rows]) for s in found}
    rows.append({"Source": "mteb", "Column": "Avg.", "Task": f"all {len(theirs)}",
                 PAPERS: average, **whole})
    rows += [{"Source": "local sets", "Column": item.column, "Task": item.name,
              **{s.label: scored[s.label][i][1] for s in found}} for i, item in enumerate(items)]
    rows.append({"Source": "local sets", "Column": "Avg.", "Task": f"all {len(items)}",
                 **{s.label: by_column(scored[s.label])["Avg."] for s in found}})
    columns = [f"{column} {mean(values):.2f}" for column in TABLE_1 if (values := [
        row[PAPERS] for row in theirs if row["Column"] == column])]
    own = next(row for row in paper.rows(paper.TABLE_1)
               if row["Model"] == PAPERS and row["Languages"] == title.split()[-1])
    return layout.write(cfg, name, f"{title}, in percent", rows, [
        sets_note(cfg, lang, items),
        f"The paper's {len(theirs)} numbers average {mean([row[PAPERS] for row in theirs]):.2f}, "
        f"where this table prints {average} and Table 1 {own['Avg.']}; by column: "
        + ", ".join(columns) + "; Table 1 prints " + ", ".join(
            f"{column} {own[column]:.2f}" for column in TABLE_1 if own[column] is not None), *more])


def table14(cfg):
    """Write Table 14: MTEB English by task."""
    return by_task_table(cfg, "table14", "en", paper.TABLE_14, paper.AVERAGE_14,
                         "Table 14: MTEB English")


def table15(cfg):
    """Write Table 15: MTEB Chinese by task."""
    return by_task_table(cfg, "table15", "zh", paper.TABLE_15, paper.AVERAGE_15,
                         "Table 15: MTEB Chinese", "mteb's benchmark has 31 of these tasks; "
                         "AmazonReviewsClassification, MassiveIntentClassification, "
                         "MassiveScenarioClassification and STS22 can be named after it in --mteb")


# ---------------------------------------------------------------- Table 5 and Appendix B

def seconds_of(encoder, texts):
    """Return the best time of encoding the texts: what else the machine does adds to the others."""
    encoder.encode(texts[:64], prompt=None)
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        encoder.encode(texts)
        times.append(time.perf_counter() - began)
    return min(times)


def practical(system, texts):
    """Return size in millions, width, seconds and (of our runs) MRL of a system; BM25: nothing."""
    if isinstance(system.model, tasks.LexicalBaseline):
        return {}
    dim = int(system.model.encode(["a"]).shape[1])
    mrl = len(system.run.settings(SUP).dims) > 1 if system.run else None
    size = sum(p.numel() for p in system.model.model.parameters())
    return {"Model Size (million)": round(size / 1e6, 1), "Embedding Dim.": dim, "MRL": mrl,
            "Infer Time (s)": seconds_of(system.model, texts)}


def table5(cfg):
    """Write Table 5: size, width, time over a fixed set of queries, MRL, score."""
    found = systems(cfg)
    items, scored = scored_sets(cfg, "en", found)
    texts = [row["text"] for row in next(i.data.queries for i in items if i.column == "Retri")]
    rows = [{"Model": row.pop("Model"), "Source": "paper", **row}
            for row in paper.rows(paper.TABLE_5)]
    for system in found:
        means = by_column(scored[system.label])
        rows.append({"Model": system.label, "Source": "here", **practical(system, texts),
                     "Avg.": means["Avg."], "Retri": means["Retri"]})
    order = [*paper.rows(paper.TABLE_5)[0], "Infer Time (s)", "Retri"]
    rows = [{"Model": row["Model"], "Source": row["Source"],
             **{key: row.get(key) for key in order[1:]}} for row in rows]
    device = next((s.model.device.type for s in found if isinstance(s.model, Embedder)), "cpu")
    return layout.write(cfg, "table5", "Table 5: practical factors", rows, [
        f"Seconds: {len(texts):,} English queries, best of {TIMED} times, {device}, "
        f"threads: {torch.get_num_threads()}; the paper's minutes are for the English queries of "
        "Multilingual Amazon Reviews on one 910B",
        sets_note(cfg, "en", items) + ". Avg. here is over local sets, the paper's is MTEB's",
        "BM25 has neither weights nor vectors. MRL of a stock model is on its model card: empty"])


def appendix_b(cfg):
    """Write Appendix B: the probe of numbers, on each of the four stages."""
    groups, kept_, rows = numbers.groups(), kept(cfg), []
    stages = [stage for stage in STAGES if (Path(cfg.out[0]) / stage).is_dir()]
    for system in tqdm(systems(cfg, stages or STAGES), desc="numbers", unit="model", disable=None):
        rows.append({"Model": system.label, **{
            name: 100 * kept_.get(system.identity, "numbers", found,
                                  lambda: numbers.accuracy(system.encoder, found))
            for name, found in groups.items()}})
    first = {name: next(iter(found)) for name, found in groups.items()}
    return layout.write(cfg, "appendix_b", "Appendix B: numbers, accuracy in percent", rows, [
        "Chance, and a model that ignores numbers: 50 in the first three columns. "
        "Last column: passages about the subject with another number, against the same number "
        "and another subject; 100 is right",
        *(f"{name}, {len(groups[name])} triplets: \"{query}\" -> \"{right}\", not \"{wrong}\""
          for name, (query, right, wrong) in first.items()),
        "The paper prints no number; it says that the model confuses these"])
