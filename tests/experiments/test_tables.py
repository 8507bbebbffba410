"""Tables and figures of a finished run, natural questions, exercises: small, on one tiny run."""
import importlib.util
import json
import shutil

import numpy as np
import pytest

from clr import TABLE_7
from experiments import exercises, figures, paper, questions, tables
from experiments.cells import Missing, read_log, read_meta, read_scores
from experiments.tables import FAMILIES, LEVELS


def make(home, name, tmp_path, *more):
    flags = [f"--out={home.out}", f"--data={home.data}", f"--results={tmp_path}", *more]
    return json.loads(tables.main([name, *flags]).read_text())["tables"]


# ---------------------------------------------------------------- tables

def test_groups_have_every_language_once():
    for groups in (LEVELS, FAMILIES):
        assert sorted(sum(groups.values(), ())) == sorted(TABLE_7)
    assert LEVELS.keys() == paper.TABLE_8.keys() and FAMILIES.keys() == paper.TABLE_9.keys()
    means = tables.grouped({"Chinese": ("zh",), "None": ("km",)}, {"zh_cn": 1, "zh_tw": 3, "de": 9})
    assert means == {"Chinese": 2, "None": None}


def test_the_papers_numbers_are_as_printed():
    assert len(paper.TABLE_13) == 25
    assert np.mean(list(paper.TABLE_13.values())) == pytest.approx(72.4, abs=0.05)
    assert paper.TABLE_4[1, 0, 0] == paper.TABLE_12["linear"]
    ours = paper.TABLE_5["Conan-embedding-v2"][4]
    assert paper.TABLE_6[0, 1] == paper.TABLE_4[1, 1, 1][1] == ours


def test_mkqa_is_one_table_of_four(home, tmp_path):
    scores, languages, levels, families = make(home, "mkqa", tmp_path).values()
    own = {row[""]: row for row in scores}
    assert {"BM25", "nanoConan, stage 3", "nanoConan, stage 4"} < own.keys()
    by_language = {row[""]: row for row in languages}
    label = "nanoConan, stage 4"
    assert by_language["de"]["paper, MKQA"] == 72.8 and by_language["ar"][label] is None
    foreign = [by_language[lang][label] for lang in ("de", "zh", "ja")]
    assert own[label]["R@20"] == pytest.approx(np.mean(foreign))
    assert {row[""]: row[label] for row in families}["Chinese"] == by_language["zh"][label]
    assert [row["paper, MKQA"] for row in levels] == [70.6, 73.47, 72.19]


def test_table_5_and_numbers(home, tmp_path):
    rows = {row["Model"]: row for row in make(home, "table5", tmp_path)[""]}
    ours = rows["nanoConan, stage 4"]
    assert ours["MRL"] and ours["dims"] == 32 and ours["time"].endswith(" s")
    assert rows["paper: Conan-embedding-v2"]["M parameters"] == 1503
    rows = make(home, "numbers", tmp_path)[""]
    assert len(rows) == 4 and list(rows[0])[1] == "cos(q, same number) - cos(q, other number)"


@pytest.mark.parametrize("argv, message", [
    (["table1"], "one of the commands mkqa, table5, numbers is needed first, not table1"),
    (["mkqa", "--data=nowhere"], "nowhere/clr_test is missing"),
    (["table5", "--out=nowhere"], "nowhere/embed_sup has no checkpoint")])
def test_mistakes_on_the_command_line(home, argv, message):
    with pytest.raises(ValueError, match=message):
        tables.main([*argv, *([f"--data={home.data}"] if "table5" in argv else [])])


@pytest.mark.parametrize("read", [read_log, read_scores, read_meta])
def test_missing_files_are_named(tmp_path, read):
    with pytest.raises(Missing, match=f"{tmp_path}.*train.py writes it"):
        read(tmp_path)


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
    cells = {f"{n}, {mask}": {str(s): {"Eng": 50.0 + s} for s in (0, 1)}
             for n in ("0M", "1M") for mask in ("hard", "soft")}
    (tmp_path / "curve.json").write_text(json.dumps(
        {"cells": cells, "points": {"0M": 0, "1M": 1_000_000}}))
    flags = [f"--out={home.out}", f"--figures={tmp_path}", f"--results={tmp_path}",
             f"--texts={home.data / 'clr_test' / 'queries.jsonl'}"]
    written = figures.main(flags)
    assert [path.stem for path in written] == list(figures.FIGURES)
    assert all(path.stat().st_size > 1000 for path in written)
    assert figures.main([*flags, f"--out={tmp_path / 'none'}", "--only=loss,mrl"]) == []
    assert "loss.png: not drawn. " in capsys.readouterr().out


def test_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match="no such figure: figure9; there are soft_mask, loss"):
        figures.main(["--only=figure9"])


# ---------------------------------------------------------------- questions and exercises

def test_a_question_is_answered_by_any_expected_name():
    asked = [{"lang": "de", "expected": ["a", "b"]}, {"lang": "de", "expected": ["c"]},
             {"lang": "zh", "expected": ["a"]}]
    found = questions.accuracy_by_language(asked, [[1, 2], [0, 1], [0]], ["a", "b", "c"])
    assert found == {"de": 0.5, "zh": 1.0, "mean": 0.75}


def test_questions_are_ranked_over_a_corpus(home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(home.out / "embed_sup", run)       # the index is kept beside the checkpoint
    path = questions.main([f"--checkpoint={run}", f"--corpus={home.data / 'test'}",
                           f"--results={tmp_path}"])
    table = json.loads(path.read_text())
    assert table["title"] == "100 natural questions"
    assert [row["top-10 accuracy"] for row in table["tables"][""]] == ["BM25", "nanoConan"]


def test_a_language_is_added_to_a_copy_of_the_project(tmp_path):
    (tmp_path / "toy").mkdir()
    for name in ("clr.py", "toy/lexicon.tsv", "toy/phrasing.tsv"):
        shutil.copy(exercises.PROJECT / name, tmp_path / name)
    exercises.add_language(tmp_path)
    spec = importlib.util.spec_from_file_location("other_clr", tmp_path / "clr.py")
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.LANGUAGES["xx"] == "Backwards" and other.TABLE_7["xx"] == 12
    header, first, *_ = (tmp_path / "toy/lexicon.tsv").read_text("utf-8").split("\n")
    assert header.endswith("\txx") and first.endswith(first.split("\t")[0][::-1])
    with pytest.raises(ValueError, match="no line"):
        (tmp_path / "clr.py").write_text("")
        exercises.add_language(tmp_path)


def test_a_mean_over_a_part_of_a_log():
    log = [{"S": 1.0}, {}, {"S": 2.0}, {"S": 3.0}, {"S": 5.0}]
    assert exercises.mean(log, "S", 0.5) == 4 and exercises.mean(log, "S", 0, 0.5) == 1.5
