"""experiments/bench.py: every CPU row runs, on a small scale; ratios and verdicts by hand."""
import importlib.util
import json

import pytest
import torch

from experiments import bench
from experiments.bench import BenchConfig, Plain
from mask import CAUSAL, FULL


@pytest.fixture
def tiny(home, tmp_path):
    """The flags of a small scale: the tiny recipe, with a vocabulary for made-up words."""
    for path in home.config.glob("*.py"):
        text = path.read_text().replace("vocab_size = 400", "vocab_size = 4096")
        (tmp_path / path.name).write_text(text.replace(str(home.config), str(tmp_path)))
    return ["--rounds=1", "--device=cpu", "--pairs=4", "--texts=12", "--head_vocab=3000",
            "--head_tokens=300", "--tokenizer_mb=0.2", "--soft_lengths=64,128",
            f"--config={tmp_path}", f"--results={tmp_path}"]


def rows_of(tiny, tmp_path, only):
    bench.main([*tiny, f"--only={only}"])
    return json.loads((tmp_path / "bench_cpu.json").read_text())["rows"]


def test_every_row_without_extras_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = rows_of(tiny, tmp_path, "lm,growth,soft,dhnm,fixed,encoding,passes,head,tokenizer")
    assert set(rows) == {
        "LM float32", "LM bfloat16", "soft step 64", "soft step 128", "DHNM step",
        "fixed float32 over plain loop", "fixed bfloat16 over plain loop", "two-pass memory",
        "two-pass time", "head time", "head memory", "latency float32, p50",
        "latency float32, p99", "latency bfloat16, p50", "latency bfloat16, p99"}
    assert all(row["measured"] > 0 for row in rows.values())
    content = json.loads((tmp_path / "bench_cpu.json").read_text())
    assert len(content["growth"]) == 5 and content["machine"]["threads"] == 1
    assert "tokenizers is not installed" in capsys.readouterr().out


@pytest.mark.extras
@pytest.mark.parametrize("only, start, packages", [
    ("encoding", "encoding", ["sentence_transformers"]), ("tokenizer", "tokenizer", ["tokenizers"]),
    ("fixed,real", "real defaults", ["sentence_transformers", "datasets", "accelerate"])])
def test_rows_beside_other_packages_run(tiny, tmp_path, only, start, packages):
    for package in packages:
        pytest.importorskip(package)
    rows = rows_of(tiny, tmp_path, only)
    assert any(name.startswith(start) for name in rows)
    assert all(row["measured"] > 0 for row in rows.values())


def test_the_plain_loop_computes_the_same(tiny):
    """Else a ratio would compare two different models."""
    cfg = bench.load_config(BenchConfig, tiny)
    model = cfg.model()
    plain = Plain(model)
    windows = torch.randint(0, 4096, (3, 20))
    batch = bench.lm_batch(windows)
    ours = model(batch.ids, batch.lengths, CAUSAL, batch.targets)
    assert plain.lm_loss(windows).item() == pytest.approx(ours.item(), rel=1e-5)
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ours = model(torch.tensor(sum(ids, [])), [3, 5], FULL)
    assert torch.allclose(plain.embed(ids), ours, rtol=1e-4, atol=1e-6)


def test_sides_are_called_in_turn_and_ratios_are_paired():
    calls = []
    sides = {"a": lambda: calls.append("a") or 2.0 * len(calls),
             "b": lambda: calls.append("b") or 1.0 * len(calls)}
    seconds = bench.in_turn(sides, 3)
    assert calls == ["a", "b", "b", "a"] * 2 and seconds["a"] == [8.0, 10.0, 16.0]
    assert bench.ratios([1, 9, 4], [1, 3, 2]) == [1, 3, 2]


def test_verdicts_and_merging(tmp_path):
    rows = bench.Rows(tmp_path, "cpu")
    for value, verdict in ((1.2, "MISSED"), (1.1, "floor"), (1.05, "goal"), (0.9, "goal")):
        rows.add("soft step 512", [value])
        assert rows.content["rows"]["soft step 512"]["met"] == verdict
    for values, verdict in (([2.4], "MISSED"), ([1, 2.5, 9], "floor"), ([5.0], "goal")):
        rows.add("real float32 over plain loop", values)
        assert rows.content["rows"]["real float32 over plain loop"]["met"] == verdict
    again = bench.Rows(tmp_path, "cpu")
    again.add("head time", [1.0])
    kept = json.loads((tmp_path / "bench_cpu.json").read_text())["rows"]
    assert kept["soft step 512"]["measured"] == 0.9 and kept["head time"]["met"] == "goal"
    assert kept["soft step 512"]["spread"] == "0.9 to 0.9"


def test_the_peak_of_memory_is_seen():
    assert bench.peak_memory(lambda: torch.ones(5_000_000)) == 20_000_000          # freed at once
    assert 0 <= bench.peak_memory(lambda: torch.ones(5_000_000) * 2) - 40_000_000 < 1000
    assert bench.peak_memory(lambda: None) == 0


def test_an_unknown_measurement_is_refused():
    with pytest.raises(SystemExit, match="no such measurement: speed; there are lm, growth"):
        bench.main(["--only=speed"])
