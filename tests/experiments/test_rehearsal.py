"""The start of a stage grows with the rows and falls with the ranks; its law is what was measured.

Limits are generous: seconds of CPU, four times the rows, twice the ranks.
"""
import json

import pytest

from engine import budget, index, tokens
from experiments import rehearsal
from ranks import on_ranks
from train import distributed


def small_parts():
    """Cut files so that a few thousand rows make several parts for each rank."""
    index.RANGE, tokens.DOCUMENTS, rehearsal.SEARCH = 1 << 16, 256, 2048


def rehearse_on(world, folder):
    small_parts()
    measured = rehearsal.rehearse(folder, world)
    if world.is_main:
        (folder / f"{world.size}.json").write_text(json.dumps(measured))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return {rows: {ranks: rehearsal}} of two sizes, on one rank and two."""
    before, found = (index.RANGE, tokens.DOCUMENTS, rehearsal.SEARCH), {}
    for n in (2000, 8000):
        folder = tmp_path_factory.mktemp(f"rows{n}")
        rehearsal.write_rows(folder, n)
        on_ranks(2, rehearse_on, folder)
        rehearse_on(distributed.ALONE, folder)
        found[n] = {r: json.loads((folder / f"{r}.json").read_text()) for r in (1, 2)}
    index.RANGE, tokens.DOCUMENTS, rehearsal.SEARCH = before
    return found


def seconds(runs, n, ranks, part):
    return runs[n][ranks]["parts"][part]["seconds"]


SLOW = ("token shards", "index of stage 4", "pools of mined rows")     # the others: milliseconds


@pytest.mark.parametrize("part", SLOW)
def test_everything_but_the_search_is_linear_in_rows(runs, part):
    assert seconds(runs, 8000, 1, part) < 2.5 * 4 * seconds(runs, 2000, 1, part) + 0.05


@pytest.mark.parametrize("part", [*SLOW, "exact search"])
def test_all_of_it_falls_with_ranks(runs, part):
    assert seconds(runs, 8000, 2, part) < 0.85 * seconds(runs, 8000, 1, part) + 0.03


def test_exact_search_reaches_a_share_of_a_matmuls_rate(runs):
    """So few texts are slow to begin: 0.07 was seen. A loop over texts would be far below."""
    assert 0.02 < rehearsal.fit(runs)["exact search"]["share"] < 1.2


def test_the_law_is_the_cost_of_a_unit(runs, tmp_path, monkeypatch, capsys):
    law, parts = rehearsal.fit(runs), runs[8000][1]["parts"]
    assert law["index of pairs"]["seconds"] == pytest.approx(
        parts["index of pairs"]["seconds"] / parts["index of pairs"]["amount"])
    cost = budget.start_minutes(law, "embed_weak", {"pairs": 8000}, 2)
    assert cost["index"] == pytest.approx(parts["index of pairs"]["seconds"] / 60 / 2)
    assert [row["part"] for row in rehearsal.table_of(runs)] == list(rehearsal.UNITS)
    assert {row["stage"] for row in rehearsal.projection(law)} == set(rehearsal.PAPER)
    # 3M x 6M, 3M x 6M and 2.8M x 5.6M pairs, 3,584 x 2 FLOP each, at 300 TFLOP/s, on 16 cards
    path = rehearsal.ROOT / "config/full/embed_sup.py"
    full = rehearsal.run.chain(rehearsal.TrainConfig, [str(path)])[-1]
    search = budget.start_minutes({**law, "exact search": {"share": 1.0}}, "embed_sup",
                                  rehearsal.PAPER["embed_sup"], 16, full.model_config())["search"]
    pairs = 3e6 * 6e6 + 3e6 * 6e6 + 2.8e6 * 5.6e6
    assert search == pytest.approx(pairs * 3584 * 2 / 3e14 / 16 / 60)
    monkeypatch.setattr(budget, "LAW", tmp_path / "law.json")
    shape = full.model_config()
    assert "experiments.rehearsal" in budget.start_report(full, shape)[-1]
    (tmp_path / "law.json").write_text(json.dumps({"law": law}))
    text = "\n".join(budget.start_report(full, shape))
    assert "DHNM's pools" in text and "search" in text
