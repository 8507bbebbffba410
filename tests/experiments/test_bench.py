"""experiments/bench.py: every CPU row runs, on a small scale; ratios and verdicts by hand."""

import importlib.util
import json

import pytest
import torch

from experiments import bench

TINY = ["--rounds=1", "--device=cpu", "--pairs=4", "--steps=1", "--texts=12",
        "--n_layer=1", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--ffn_dim=48",
        "--head_vocab=3000", "--head_tokens=300", "--tokenizer_mb=0.2", "--longest=512",
        "--soft_lengths=64,128"]


def run(folder, *more):
    bench.main([*TINY, f"--out={folder}", *more])
    return json.loads((folder / "bench_cpu.json").read_text())


def test_every_row_without_extras_runs(tmp_path, capsys):
    found = run(tmp_path, "--only=soft,length,supervised,padding,cached,head")
    rows = found["rows"]
    assert set(rows) == {"soft step 64", "soft step 128", "DHNM step", "data wait share",
                         "padding share", "padded step over packed", "cached memory",
                         "cached time", "head time", "head memory"}
    assert all(row["measured"] >= 0 for row in rows.values())
    assert 0 < rows["padding share"]["measured"] < 0.10 and rows["padding share"]["met"] == "floor"
    assert rows["data wait share"]["measured"] < 1
    table, = found["tables"].values()
    assert [row["tokens"] for row in table] == [512] and table[0]["soft, ms"] > 0
    shown = capsys.readouterr().out
    for name, (floor, goal) in bench.GOALS.items():
        if name in rows:
            line = next(x for x in shown.splitlines() if x.startswith(name + " "))
            assert line[36:].split()[:2] == [format(floor, ".3g"), format(goal, ".3g")]


@pytest.mark.extras
def test_the_tokenizers_row_runs(tmp_path):
    pytest.importorskip("tokenizers")
    rows = run(tmp_path, "--only=tokenizer")["rows"]
    assert rows["tokenizer encoding"]["measured"] > 0 and "backend" in rows["tokenizer training"]


@pytest.mark.extras
@pytest.mark.parametrize("only, what, packages", [
    ("encoding", "encoding", ["sentence_transformers"]),
    ("fixed,real", "training", ["sentence_transformers", "datasets", "accelerate"])])
def test_rows_against_sentence_transformers_run(tmp_path, only, what, packages):
    for package in packages:
        pytest.importorskip(package)
    rows = run(tmp_path, f"--only={only}")["rows"]
    assert set(rows) == {name for name in bench.GOALS if name.startswith(what)
                         and name != "encoding reviews"}
    assert all(row["measured"] > 0 for row in rows.values())


def test_a_row_without_its_package_is_left_out_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench.main([*TINY, f"--out={tmp_path}", "--only=real,encoding,tokenizer"])
    assert not (tmp_path / "bench_cpu.json").exists()
    assert capsys.readouterr().out.count("is not installed") == 3


def test_sides_are_called_in_turn_and_ratios_are_paired():
    calls = []
    sides = {"a": lambda: calls.append("a") or 2.0 * len(calls), "b": lambda: calls.append("b")
             or 1.0 * len(calls)}
    seconds = bench.in_turn(sides, 3)
    assert calls == ["a", "b", "b", "a"] * 2 and seconds["a"] == [8.0, 10.0, 16.0]
    assert bench.ratio([1, 9, 4], [1, 3, 2]) == 2                  # of 1, 3, 2; not 4 / 2
    assert bench.ratio([10, 2, 30], [1, 2, 3]) == 10


def test_verdicts_and_merging(tmp_path):
    found = bench.Found(tmp_path / "x.json", "cpu")
    for value, verdict in ((1.2, "MISSED"), (1.1, "floor"), (1.05, "goal"), (0.9, "goal")):
        found.row("soft step 512", value)
        assert found.rows["soft step 512"]["met"] == verdict
    for value, verdict in ((2.4, "MISSED"), (2.5, "floor"), (5.0, "goal")):
        found.row("training real float32", value)
        assert found.rows["training real float32"]["met"] == verdict
    again = bench.Found(tmp_path / "x.json", "cpu")
    again.row("head time", 1.0)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["soft step 512"]["measured"] == 0.9 and rows["head time"]["met"] == "goal"


def test_the_peak_of_memory_is_seen():
    assert bench.peak_memory(lambda: torch.ones(5_000_000)) == 20_000_000          # freed at once
    assert 0 <= bench.peak_memory(lambda: torch.ones(5_000_000) * 2) - 40_000_000 < 1000
    assert bench.peak_memory(lambda: None) == 0


def test_every_goal_has_a_meaning_and_an_unknown_name_is_refused(tmp_path):
    for name in bench.GOALS:
        assert any(name.startswith(key) for key in bench.MEANS), name
    with pytest.raises(SystemExit, match="no such measurement: speed; there are fixed, real"):
        bench.main([*TINY, f"--out={tmp_path}", "--only=speed"])
