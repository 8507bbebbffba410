"""Figures, natural questions and exercises of a finished run, on one tiny run."""
import json
import shutil
import sys

import numpy as np
import pytest

from experiments import figures, results, tables
from experiments.runs import mean, read_scores

RUN = {"minutes": 9.0, "cores": 2, "memory_gb": 2.2, "BM25": {"retrieval/docs/test/ndcg@10": 0.64},
       "pretrain": {"lm/docs/dev/loss": 4.0, "retrieval/docs/test/ndcg@10": 0.1},
       "embed_sup": {"retrieval/docs/test/ndcg@10": 0.5, "retrieval/docs/test/ndcg@10:64": 0.4,
                     "retrieval/clr_test/mean/ndcg@10": 0.3}}


def make(home, name, tmp_path, *more):
    flags = [f"--out={home.out}", f"--results={tmp_path}", *more]
    return json.loads(tables.main([name, *flags]).read_text())


@pytest.mark.parametrize("argv, message", [
    (["table1"], "one of the commands default_run, small, questions, .* first, not table1"),
    ([], "not none"), (["exercises", "--out=nowhere", "--results=nowhere"],
                       "nowhere: no exercise of docs/exercises.md")])
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message):
        tables.main(argv)


def test_help_is_what_the_module_says(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", tables)
    with pytest.raises(SystemExit) as end:
        tables.main(["--help"])
    assert end.value.code is None and capsys.readouterr().out.startswith("Tables of finished runs")


def test_stage_4_is_scored_by_dims_and_on_sts(home):
    scores = read_scores(home.out / "embed_sup")
    assert any(key.startswith("sts/sts_test/") for key in scores)
    assert "retrieval/data/test/ndcg@10:8" in scores
    assert not any(":" in key for key in read_scores(home.out / "embed_weak"))


# ---------------------------------------------------------------- whole runs

def test_whole_runs_have_a_row_for_each_stage_and_a_seed_for_each_run(tmp_path):
    flags = [f"--out={tmp_path / 'one'},{tmp_path / 'two'}", f"--results={tmp_path}"]
    for name in ("one", "two"):
        (tmp_path / name / "embed_sup").mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(RUN))
        (tmp_path / name / "embed_sup" / "log.jsonl").write_text(
            '{"tokens": 600, "tokens_per_second": 10}\n{"tokens": 900, "tokens_per_second": 5}\n')
    tables.main(["default_run", *flags])
    table = json.loads((tmp_path / "default_run.json").read_text())
    assert table["cells"]["embed_sup"]["1"] == {
        "nDCG@10": 0.5, "26 languages": 0.3, "64 dims": 0.4}
    lines = results.lines_of(table)
    assert lines[2] == "|  | nDCG@10 | LM loss | 26 languages | 64 dims |"
    assert "| pretrain | 0.100 ± 0.000 | 4.00 ± 0.00 |  |  |" in lines
    assert not any(line.startswith("| sft") for line in lines)
    assert table["notes"] == ["The fastest run took 9.0 minutes and 2.2 GB on 2 cores; of the "
                              "minutes steps of embed_sup 2.0."]
    for name in ("one", "two"):                        # their last part took a minute
        (tmp_path / name / "summary.json").write_text(json.dumps(RUN | {"minutes": 1.0}))
    tables.main(["small", *flags])
    table = json.loads((tmp_path / "small.json").read_text())
    assert table["title"] == "The recipe of config/small" and table["notes"] == [
        "The runs were made in parts, stage by stage. Minutes of steps in the fastest: embed_sup "
        "2.0."]


# ---------------------------------------------------------------- figures

def test_curves_are_divided_by_task():
    rows = [{"step": 1, "task": "a", "S": 2.0}, {"step": 2, "task": "b"},
            {"step": 3, "task": "a", "S": 4.0}]
    assert figures.by_task(rows, "S") == {"a": ([1, 3], [2.0, 4.0])}


def test_components_are_ordered_by_their_spread():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) * [1, 9, 3]
    points = figures.components(x)
    assert abs(np.corrcoef(points[:, 0], x[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], x[:, 2])[0, 1]) > 0.99


@pytest.mark.extras
def test_every_figure_is_drawn(home, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    cells = {f"{n} {mask}": {str(s): {"Eng": 50.0 + s} for s in (0, 1)}
             for n in ("0M", "1M") for mask in ("hard", "soft")}
    (tmp_path / "curve.json").write_text(json.dumps(
        {"cells": cells, "points": {"0M": 0, "1M": 1_000_000}}))
    (tmp_path / "baselines.json").write_text(json.dumps(
        {"scores": {"BM25": {"retrieval/data/test/ndcg@10": 0.6}}}))
    flags = [f"--out={home.out}", f"--figures={tmp_path}", f"--results={tmp_path}",
             f"--texts={home.data / 'clr_test' / 'queries.jsonl'}"]
    written = figures.main(flags)
    assert [path.stem for path in written] == list(figures.FIGURES)
    assert all(path.stat().st_size > 1000 for path in written)
    figures.main([*flags, f"--out={home.out},{home.out}", "--only=figure1"])
    sizes = json.loads((tmp_path / "figure1.json").read_text())["cells"].values()
    assert [list(seeds) for seeds in sizes] == [["0", "1"]]    # two runs of one size
    assert figures.main([*flags, f"--out={tmp_path / 'none'}", "--only=loss,mrl"]) == []
    assert "loss.png: not drawn. " in capsys.readouterr().out


@pytest.mark.extras
def test_figure_3_has_each_language_before_and_after(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    vectors = {f"{lang} {i}": np.array([3.0 * i, 20 * (lang == "zh"), i * i])
               for lang in ("en", "zh") for i in range(5)}

    class Stub:
        def __init__(self, folder):
            self.scale = {"before": 1, "after": -2}[folder]

        def encode(self, texts, prompt=None):
            return self.scale * np.stack([vectors[text] for text in texts])

    monkeypatch.setattr(figures, "Embedder", Stub)
    monkeypatch.setattr(figures, "LANGUAGES", ("en", "zh"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "lang": text[:2]}) + "\n"
                            for text in ["ja 0", *vectors]))                # ja is none of them
    figure = figures.draw_figure3(figures.FiguresConfig(before="before", after="after",
                                                        texts=str(path)))
    for plot, scale in zip(figure.axes, (1, -2), strict=True):
        points = figures.components(scale * np.stack(list(vectors.values())))
        for dots, own in zip(plot.collections, (points[:5], points[5:]), strict=True):
            assert np.allclose(dots.get_offsets(), own)


def test_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match="no such figure: figure9; there are soft_mask, loss"):
        figures.main(["--only=figure9"])


# ---------------------------------------------------------------- questions and exercises

def test_a_question_is_answered_by_any_expected_name():
    asked = [{"lang": "de", "expected": ["a", "b"]}, {"lang": "de", "expected": ["c"]},
             {"lang": "zh", "expected": ["a"]}]
    shares = tables.accuracy_by_language(asked, [[1, 2], [0, 1], [0]], ["a", "b", "c"])
    assert shares == {"de": 0.5, "zh": 1.0, "mean": 0.75}


def test_questions_are_ranked_over_a_corpus(home, tmp_path):
    shutil.copytree(home.out / "embed_sup", tmp_path / "run" / "embed_sup")    # gets an index
    out = str(tmp_path / "run")
    table = make(home, "questions", tmp_path, f"--out={out}", f"--corpus={home.data / 'test'}")
    assert table["title"] == "100 natural questions"
    assert [row["top-10 accuracy"] for row in table["tables"][""]] == ["BM25", out]


def test_exercises_that_have_been_done_are_read(home, tmp_path):
    out = tmp_path / "out"
    for name in ("sft", "embed_weak", "no_lm/embed_weak", "logits/embed_weak", "fixed/embed_sup",
                 "v2/embed_sup"):
        shutil.copytree(home.out / name.split("/")[-1], out / name)
    alone = out / "v2/embed_sup/log.jsonl"         # as if retrieval had been the only task
    alone.write_text("".join(line for line in open(alone)
                             if json.loads(line)["task"] == "retrieval"))
    (out / "mine").mkdir()
    shutil.copy(home.out / "summary.json", out / "mine")
    flags = [f"--out={out}", f"--corpus={home.data / 'test'}"]
    rows = make(home, "exercises", tmp_path, *flags)["tables"]
    assert list(rows) == ["language_model", "logits", "dhnm", "pairs"]   # the fifth is not there
    cells = {name: table["cells"] for name, table in rows.items()}
    added, multiplied = (seeds["0"]["attention to later tokens at alpha 0"]
                         for seeds in cells["logits"].values())
    assert added == 0 < multiplied < 1
    chain, other = cells["language_model"].values()
    assert chain == other and list(chain) == ["0"]
    assert {"nDCG@10", "nDCG@10 zh-en"} <= chain["0"].keys() and "S, last fifth" not in chain["0"]
    assert {"S, last fifth", "S_0, last fifth", "loss, last tenth",
            "replaced a step, last four fifths"} <= cells["dhnm"]["v2"]["0"].keys()
    assert all("nDCG" in name for name in cells["dhnm"]["fixed"]["0"])     # of several tasks
    assert list(cells["pairs"]) == ["BM25", "pretrain", "sft", "embed_weak", "embed_sup"]
    shutil.rmtree(out / "no_lm")
    again = make(home, "exercises", tmp_path, *flags)["tables"]
    assert again["language_model"] == rows["language_model"]   # what is recorded stays


def test_exercises_on_two_seeds_have_paired_differences(tmp_path):
    scores = {"out0/embed_weak": 0.5, "out0/no_lm/embed_weak": 0.25, "out1/embed_weak": 0.75,
              "out1/no_lm/embed_weak": 0.25, "out1/logits/embed_weak": 0.0}
    for folder, score in scores.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "eval.json").write_text(json.dumps(
            {"retrieval/data/test/ndcg@10": score}))
        (tmp_path / folder / "log.jsonl").write_text("")
    flags = [f"--out={tmp_path / 'out0'},{tmp_path / 'out1'}", f"--results={tmp_path}"]
    tables.main(["exercises", *flags])
    found = json.loads((tmp_path / "exercises.json").read_text())
    assert list(found["tables"]) == ["language_model"]         # no other one has both seeds
    lines = results.lines_of(found)
    # means 0.625 and 0.25; t(1) = 12.7062 times 0.25 / sqrt(2) / sqrt(2) is 1.588
    assert "| after stages 1 and 2 | 0.62 ± 1.59 |" in lines
    assert "| from random weights, minus after stages 1 and 2 | -0.38 ± 1.59 |" in lines


def test_a_mean_over_a_part_of_a_log():
    log = [{"S": 1.0}, {}, {"S": 2.0}, {"S": 3.0}, {"S": 5.0}]
    assert mean(log, "S", 0.5) == 4 and mean(log, "S", 0, 0.5) == 1.5
    assert mean(log, "loss") is None
