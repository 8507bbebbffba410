"""The paper's tables by language: MKQA (Table 3, 13), CLR's shares and their groups (7, 8, 9).

    python -m experiments.tables table13                                 # the default run in out/
    python -m experiments.tables table13 --root=FOLDER --out=out/real    # questions of a *_dev set
    python -m experiments.tables table8 --collection=FOLDER              # MKQA itself, say

MKQA's protocol (Sec. 4.4): questions in many languages, English passages, recall@20 and @100 and
nDCG@10 of each language. Limitations A.2 and A.3 group its languages by resources and by family,
and compare with their share of the CLR rows. UNSPECIFIED: which languages are low-resource, and
"Others"; here all that no other group has, so that every language of Table 7 is in one.
"""
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import tasks
from clr import LANGUAGES, TABLE_7
from data import load_collection, read_jsonl
from eval import mkqa
from experiments import layout, paper
from experiments.columns import mean
from experiments.runs import Missing, Run
from experiments.scores import PAPERS, kept, systems
from mixture import sources
from tools.sets import held_out_collections
from train import STAGES

WEAK, SUP = STAGES[2:]
MKQA = {"R@20": "recall@20", "R@100": "recall@100", "nDCG@10": "ndcg@10"}
HIGH, MID = ("en", "zh"), ("es", "fr", "ja", "de", "ru", "it", "pt")   # Limitations A.2
LEVELS = {"High-resource": HIGH, "Mid-resource": MID,
          "Low-resource": tuple(lang for lang in TABLE_7 if lang not in HIGH + MID)}
NAMED = {"Chinese": ("zh",), "Germanic": ("en", "de", "da", "nl", "no", "sv"),
         "Romance": ("es", "fr", "it", "pt"), "Slavic": ("pl", "ru"), "Arabic": ("ar",),
         "Korean": ("ko",)}                                            # Limitations A.3
FAMILIES = {**NAMED, "Others": tuple(lang for lang in TABLE_7
                                     if lang not in sum(NAMED.values(), ()))}


# ---------------------------------------------------------------- Tables 3, 13: MKQA

def mkqa_collection(cfg):
    """Return the folder whose questions in many languages ask for English passages."""
    if cfg.collection:
        return Path(cfg.collection)
    folders = held_out_collections(cfg.root) if cfg.root else \
        [Path(Run(cfg.out[0]).settings(SUP).docs) / "clr_test"]
    for folder in folders:
        if (folder / "qrels.tsv").is_file() or (folder / "qrels.tsv.gz").is_file():
            found = load_collection(folder)
            if "en" in tasks.languages_in(found.corpus) and \
                    len(tasks.languages_in(found.queries)) > 1:
                return folder
    raise Missing(f"no questions in several languages for English passages in "
                  f"{cfg.root or folders[0]}; name some by --collection=FOLDER (corpus, queries, "
                  "qrels, with lang)")


def mkqa_scores(cfg, stages=(WEAK, SUP)):
    """Return (collection's folder, [System], {label: {language or "mean": {metric: percent}}})."""
    folder, kept_ = mkqa_collection(cfg), kept(cfg)
    collection, found, scores = load_collection(folder), systems(cfg, stages), {}
    for system in tqdm(found, desc=f"mkqa, {folder.name}", unit="model", disable=None):
        value = kept_.get(system.identity, "mkqa", collection,
                          lambda: mkqa(system.encoder, collection))
        scores[system.label] = {lang: {metric: 100 * part[key] for metric, key in MKQA.items()}
                                for lang, part in value.items()}
    return folder, found, scores


def mkqa_note(folder, scores):
    """Say what was asked of what."""
    languages = [lang for lang in next(iter(scores.values())) if lang != "mean"]
    return (f"Here: {folder.name}, questions in {len(languages)} languages against its English "
            "passages; relevant is what its qrels say. The mean is over languages other than "
            "English. MKQA itself: `python -m tools.prepare mkqa --out=data` has the questions; with "
            "NQ's passages as corpus.jsonl and qrels.tsv, --collection=FOLDER scores it")


def table3(cfg):
    """Write Table 3: MKQA's three metrics, mean over languages."""
    folder, found, scores = mkqa_scores(cfg)
    rows = [{"Model": row.pop("Model"), "Source": "paper, MKQA", **row}
            for row in paper.rows(paper.TABLE_3)]
    rows += [{"Model": system.label, "Source": folder.name, **scores[system.label]["mean"]}
             for system in found]
    return layout.write(cfg, "table3", "Table 3: cross-lingual retrieval by MKQA's protocol", rows,
                        [mkqa_note(folder, scores)])


def table13(cfg):
    """Write Table 13: recall@20 of every query language."""
    folder, found, scores = mkqa_scores(cfg)
    theirs = {row.pop("Language").removesuffix("_cn"): row for row in paper.rows(paper.TABLE_13)}
    theirs["mean"] = theirs.pop("Avg")
    more = [lang for lang in next(iter(scores.values())) if lang not in theirs]
    rows = []
    for lang in [*list(theirs)[:-1], *more, "mean"]:
        own = {s.label: scores[s.label].get(lang, {}).get("R@20") for s in found}
        rows.append({"Language": lang,
                     **{f"{name}, MKQA": value for name, value in theirs.get(lang, {}).items()},
                     **{f"{label}, {folder.name}": value for label, value in own.items()}})
    return layout.write(cfg, "table13", "Table 13: recall@20 by query language", rows,
                        [mkqa_note(folder, scores)], digits=1)


# ---------------------------------------------------------------- Tables 7, 8, 9: groups

def grouped(groups, values):
    """Return {group: mean of the values of its languages, None without any}.

    values: {language: number}; "zh_cn" and the like count for "zh".
    """
    return {group: mean([value for lang, value in values.items()
                         if lang.split("_")[0] in members]) for group, members in groups.items()}


def shares(counts):
    """Return {language: percentage} of {language: number}."""
    total = sum(counts.values())
    return {lang: 100 * count / total for lang, count in counts.items()}


def clr_languages(run):
    """Return {language: rows} of the CLR rows that stage 4 was trained on.

    Raises Missing if it had none.
    """
    cfg = run.settings(SUP)
    files = sources(cfg, "clr")
    if not files:
        raise Missing(f"{run.folder / SUP} was trained without CLR rows; make some by clr.py, or "
                      f"the embedded corpus's by: {run.command(SUP)}")
    return Counter(row.get("lang") or row.get("lang_q") for path in files
                   for row in read_jsonl(path))


def grouped_table(cfg, name, title, groups, printed, columns, *more):
    """Write Table 8 or 9; columns: what the paper calls group, share and score; more: notes."""
    group, share, performance = columns
    folder, found, scores = mkqa_scores(cfg)
    counts = clr_languages(Run(cfg.out[0]))
    wanted, real = shares(TABLE_7), shares(counts)
    from_13 = grouped(groups, {row["Language"]: row[PAPERS]
                               for row in paper.rows(paper.TABLE_13)})
    here = {s.label: grouped(groups, {lang: part["R@20"] for lang, part in scores[s.label].items()
                                      if lang not in ("mean", "en")}) for s in found}
    rows = [{group: row[group], "Languages": " ".join(groups[row[group]]),
             f"{share}, paper": row[share],
             "Table 7's, of 106": sum(wanted[lang] for lang in groups[row[group]]),
             "rows here": sum(real.get(lang, 0.0) for lang in groups[row[group]]),
             f"{performance}, paper": row[performance], "from Table 13": from_13[row[group]],
             **{f"{s.label}, {folder.name}": here[s.label][row[group]] for s in found}}
            for row in paper.rows(printed)]
    return layout.write(cfg, name, title, rows, [
        mkqa_note(folder, scores),
        "Shares in percent of the CLR rows, scores are recall@20 without English. Table 7's shares "
        "add up to 106 and are normalised. \"From Table 13\": the paper's own numbers by language, "
        "in these groups (all three Chinese ones count)", *more])


def table8(cfg):
    """Write Table 8: CLR shares and MKQA's recall by resource level."""
    return grouped_table(cfg, "table8", "Table 8: by resource level", LEVELS, paper.TABLE_8,
                         ("Resource", "Proportion", "Performance"))


def table9(cfg):
    """Write Table 9: CLR shares and MKQA's recall by language family."""
    return grouped_table(cfg, "table9", "Table 9: by language family", FAMILIES, paper.TABLE_9,
                         ("Language Family", "Total Share", "Avg. Score"),
                         "The paper's share of Chinese is English and Chinese together; its score "
                         "of Others is the mean of Finnish, Hebrew, Hungarian and Khmer alone")


def table7(cfg):
    """Write Table 7: the language shares that were asked of clr.py, and those that it made."""
    run = Run(cfg.out[0])
    counts, files = clr_languages(run), sources(run.settings(SUP), "clr")
    wanted, real = shares(TABLE_7), shares(counts)
    rows = [{"Language": LANGUAGES[lang], "Proportion, paper": f"{TABLE_7[lang]}%",
             "of 106": wanted[lang], "rows here": counts.get(lang, 0),
             "share here": real.get(lang, 0.0)} for lang in TABLE_7]
    rows += [{"Language": lang, "rows here": n, "share here": real[lang]}
             for lang, n in counts.items() if lang not in TABLE_7]
    most = max(abs(wanted.get(lang, 0) - real.get(lang, 0)) for lang in {*wanted, *real})
    return layout.write(cfg, "table7", "Table 7: languages of the CLR queries, in percent", rows, [
        f"{counts.total():,} rows of {', '.join(files)}; the largest difference from Table 7 is "
        f"{most:.2f} points: what clr.py's gates dropped, or translations that people made and "
        "nobody allotted"])
