"""Tables from files by hand: intervals, Markdown, marked pages; and this project's own pages."""
import json
import math

import pytest

from experiments import results
from experiments.results import interval, paired

CELLS = {"seeds": [0, 1], "cells": {
    "a": {"0": {"Eng": 60.0, "S": 1}, "1": {"Eng": 62.0, "S": 3}},
    "b": {"0": {"Eng": 61.0, "S": 1}, "1": {"Eng": 63.0, "S": 2}}, "c": {}},
    "differences": {"b minus a": [["b"], ["a"]]}, "paper": {"a": {"Eng": 70.41}},
    "language_models": {"lm0": {"tokens": 2_500_000, "loss": 3.456}}, "title": "A table"}


# ---------------------------------------------------------------- statistics

def test_interval_by_hand():
    """1, 2, 3: s = 1, t of two degrees of freedom 4.3027, half = 4.3027 / sqrt(3)."""
    mean, half = interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-4)
    assert interval([5, 5, 5]) == (5, 0)
    assert interval(range(20))[1] == pytest.approx(2.2622 * 35 ** 0.5 / 20 ** 0.5)
    mean, half = interval([7])
    assert mean == 7 and math.isnan(half)


@pytest.mark.extras
def test_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 1.7, 0.9, 1.1, 2.4, -0.5]
    for df in range(1, 10):
        assert results.T_95[df - 1] == pytest.approx(stats.t.ppf(0.975, df), rel=1e-4)
    low, high = stats.t.interval(0.95, 5, loc=sum(values) / 6, scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-4)


def test_differences_are_paired_by_seed():
    """Seeds that differ by 10 from each other, cells by 1: the spread of the seeds cancels."""
    ours, base = {0: 11.0, 1: 21.0, 2: 31.5, 7: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0, 9: 0.0}
    mean, half = paired(ours, base)
    assert mean == pytest.approx(3.5 / 3)              # 1, 1, 1.5; seeds 7 and 9 are alone
    assert half == pytest.approx(4.302653 * math.sqrt(1 / 12) / math.sqrt(3), abs=1e-4)
    assert half < interval([11, 21, 31.5])[1] / 10


def test_a_difference_is_bold_if_it_exceeds_its_interval():
    assert results.difference((1.26, 0.5)) == "**+1.26 ± 0.50**"
    assert results.difference((-0.4, 0.5)) == "-0.400 ± 0.500"
    assert results.difference((1.26, math.nan)) == "+1.26"
    assert results.difference((0.0, 0.0)) == "+0.000 ± 0.000"


# ---------------------------------------------------------------- the forms of files

def test_cells_have_means_intervals_differences_and_the_papers_numbers():
    lines = results.cells_lines(CELLS)
    assert "| a | 61.0 ± 12.7 | 2.0 ± 12.7 | 70.4 |" in lines     # 12.706 * 1.414 / 1.414
    assert "| b minus a | **+1.00 ± 0.00** | -0.50 ± 6.35 |" in lines
    assert not any(line.startswith("| c |") for line in lines)    # no seed yet
    assert "- lm0: 2.5M tokens, loss 3.46 on dev." in lines
    turned = results.cells_lines(CELLS | {"transpose": True})
    assert "| Eng | 61.0 ± 12.7 | 62.0 ± 12.7 | **+1.00 ± 0.00** |" in turned


def test_a_seed_that_one_side_lacks_is_in_no_difference():
    cells = {"a": {"0": {"x": 1.0}, "1": {"x": 5.0}}, "b": {"1": {"x": 4.0}, "2": {"x": 9.0}}}
    assert results.mean_of({"cells": cells}, ["a", "b"], "x") == {"1": 4.5}
    cells["c"] = {"3": {"x": 1.0}}
    assert not results.differences({"seeds": [0, 3], "cells": cells,
                                    "differences": {"a minus c": [["a"], ["c"]]}}, ["x"])
    row, = results.differences({"seeds": [0, 1, 2], "cells": cells,
                                "differences": {"d": (["a"], ["b"])}}, ("x", "y"))
    assert row == {"": "d (1 seed)", "x": "+1.00"}


def test_rounds_have_a_value_for_each_language_model():
    """Seeds 0 and 2 share a language model, 1 has its own: 2 and 4, then 1 and 5 in the first."""
    def table(**gains):
        return {"language_models": {"a": {}, "b": {}}, "differences": {"b minus a": (["b"], ["a"])},
                "cells": {"a": {seed: {"Eng": 50.0, "new": 1.0} for seed in gains},
                          "b": {seed: {"Eng": 50.0 + gain, "new": 2.0}
                                for seed, gain in gains.items()}}}
    first, again, last = (table(**{"0": a, "1": b, "2": c})
                          for a, b, c in ((0, 5, 2), (9, 7, 9), (1, 4, 3)))
    for row in first["cells"]["b"].values():
        del row["new"]                                 # a column that not all rounds have
    assert results.by_language_model(last, ["b"], ["a"], "Eng") == [2, 4]
    tables = {"table4_first": first, "table4": last}
    assert results.rounds(tables, "table4") == [
        {"": "b minus a", "models": 4, "Eng": results.difference(interval([1, 5, 2, 4]))}]
    tables = {"table12": last, "table12_first": first, "table12_again": again}
    row, more = results.rounds(tables, "table12")
    assert row["models"] == 6 and "new" not in row
    assert more == {"": "b minus a, without the first round", "models": 4,
                    "Eng": results.difference(interval([9, 7, 2, 4])), "new": "**+1.00 ± 0.00**"}
    again["cells"].pop("b")                            # a round without this row
    row, = results.rounds(tables, "table12")
    assert row["models"] == 4


# ---------------------------------------------------------------- pages

@pytest.fixture
def project(tmp_path):
    """A README with two marked tables and a results folder with one of them."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- results:default_run -->\nold\n<!-- /results -->\nbetween\n"
        "<!-- results:ideas -->\nnothing yet\n<!-- /results -->\n")
    (tmp_path / "results" / "default_run.json").write_text(json.dumps(
        {"seeds": [0], "cells": {"BM25": {"0": {"nDCG@10": 0.64}}}}))
    return tmp_path


def test_marked_tables_are_filled_and_the_others_stay(project):
    pages = results.stale(project)
    text, page = pages[project / "README.md"], pages[project / "docs" / "results.md"]
    assert "old" not in text and "| BM25 | 0.640 |" in text and "nothing yet" in text
    assert text.startswith("before\n<!-- results:default_run -->\nSeed 0.\n\n|")
    assert "\nbetween\n" in text and "\n## Default run\n" in page
    assert page.startswith("# Results\n\n*No conclusion recorded yet.*")
    for path, text in pages.items():
        path.write_text(text)
    assert results.stale(project) == {}                # a page is stale until it is written
    (project / "results" / "conclusions.md").write_text("The mask pays.\n")
    page, = results.stale(project).values()
    assert "\n\nThe mask pays.\n\n" in page


def test_ideas_are_three_rows_of_table_4():
    names = [f"{part}: with minus without" for part in ("SM", "CLR", "DHNM")]
    table = CELLS | {"differences": {name: (["b"], ["a"]) for name in names}}
    lines = results.blocks({"table4": table})["ideas"]
    assert "| CLR |  | **+1.00 ± 0.00** |  |" in lines and len(lines) == 7
    del table["differences"][names[0]]                     # a table that is not finished
    lines = results.blocks({"table4": table})["ideas"]
    assert "| CLR |  | **+1.00 ± 0.00** |  |" in lines and len(lines) == 6


def test_a_question_for_help_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(results, "stale", None)        # a page that is written raises TypeError
    monkeypatch.setattr("sys.argv", ["results.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code is None and "from results/, and fill" in capsys.readouterr().out


def test_this_projects_pages_say_what_its_results_say():
    """Run `python -m experiments.results` if this fails."""
    if not results.read_results(results.ROOT / "results"):
        pytest.skip("nothing is recorded yet")
    assert results.stale() == {}
