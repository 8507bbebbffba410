"""experiments/bench.py: every CPU row runs, on a small scale; ratios and verdicts by hand."""
import json
import sys
from importlib.util import find_spec

import pytest
import torch

from experiments import bench
from experiments.bench import BenchConfig
from mask import CAUSAL


@pytest.fixture
def tiny(home, tmp_path):
    """The flags of a small scale: the tiny recipe, with a vocabulary for made-up words."""
    for path in home.config.glob("*.py"):
        text = path.read_text().replace("vocab_size = 400", "vocab_size = 4096")
        (tmp_path / path.name).write_text(text.replace(str(home.config), str(tmp_path)))
    return ["--rounds=1", "--device=cpu", "--pairs=4", "--texts=12", "--head_vocab=3000",
            "--head_tokens=300", "--soft_lengths=64,128", f"--config={tmp_path}",
            f"--results={tmp_path}"]


def rows_of(tiny, tmp_path, only):
    bench.main([*tiny, f"--only={only}"])
    table = json.loads((tmp_path / "bench_cpu.json").read_text())["tables"]["speed"]
    return {row[""]: row for row in table}


def test_every_row_without_extras_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)        # not installed
    monkeypatch.setattr(bench.distributed, "compile_blocks", lambda model: None)
    monkeypatch.setattr(bench.distributed, "compilers", lambda: ["/usr/bin/c++"])
    rows = rows_of(tiny, tmp_path, ",".join(bench.MEASUREMENTS["cpu"]))
    assert set(rows) == {
        "LM float32", "LM float32, --compile=true", "LM bfloat16",
        "LM bfloat16, --compile=true", "soft step 64", "soft step 128", "DHNM step",
        "two-pass memory", "two-pass time", "head time", "head memory"}
    assert all(row["measured"] > 0 for row in rows.values())
    content = json.loads((tmp_path / "bench_cpu.json").read_text())
    assert len(content["tables"]["growth"]) == 5 and ", 1 threads, " in content["notes"][0]
    printed = capsys.readouterr().out
    assert all(f"{name}: left out, " in printed for name in ("fixed", "real", "encoding"))
    if any(find_spec(name) is None for name in ("safetensors", "tokenizers")):
        assert "profile: left out, " in printed            # it profiles an exported model
        return
    shares = content["tables"]["profile, percent of the time"]
    for column in ("LM step", "plain LM step", "fixed step", "encoding float32"):
        assert 20 < sum(row.get(column, 0) for row in shares) <= 100.1, column


@pytest.mark.extras
@pytest.mark.parametrize("only, start", [
    ("encoding", "encoding bfloat16, one query, p99"), ("fixed,real", "real defaults")])
def test_rows_beside_sentence_transformers_run(tiny, tmp_path, only, start):
    pytest.importorskip("sentence_transformers")
    rows = rows_of(tiny, tmp_path, only)
    assert any(name.startswith(start) for name in rows)
    assert all(row["measured"] > 0 for row in rows.values())


def test_the_plain_loop_computes_the_same(tiny):
    """Else a ratio would compare two different models."""
    model = bench.load_config(BenchConfig, tiny).model()
    windows = torch.randint(0, 4096, (3, 20))
    batch = bench.data.lm_batch(windows, None)
    ours = model(batch.ids, batch.lengths, CAUSAL, batch.targets)
    assert bench.plain_lm_loss(model, windows).item() == pytest.approx(ours.item(), rel=1e-5)


def test_sides_are_called_in_turn_and_ratios_are_paired(tmp_path, monkeypatch):
    """Each call takes longer than the one before it: there and back, that cancels."""
    calls = []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: len(calls) ** 2)
    seconds = bench.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] + ["b", "a", "a", "b"] * 2
    assert seconds == {"a": [8, 16], "b": [8, 16]}
    rows = bench.Rows(BenchConfig(results=str(tmp_path)))
    rows.ratio("LM", [1, 9, 4], [1, 3, 2], amount=10)
    row, = rows.tables["speed"]
    assert (row["measured"], row["spread"], row["per second"]) == (2, "1.5 to 2.5", 5)


def test_verdicts_and_merging(tmp_path):
    cfg = BenchConfig(results=str(tmp_path))
    rows = bench.Rows(cfg)
    for name, value, verdict in (
            ("soft step 512", 1.2, "MISSED"), ("soft step 512", 1.1, "floor"),
            ("soft step 512", 1.05, "goal"), ("real float32", 2.4, "MISSED"),
            ("real float32", 2.5, "floor"), ("real defaults", 5.0, "floor")):
        rows.add(name, [value])
        assert rows.tables["speed"][-1]["met"] == verdict
    bench.Rows(cfg).add("head time", [1.0])
    path = tmp_path / "bench_cpu.json"
    table = json.loads(path.read_text())["tables"]["speed"]
    assert [row["measured"] for row in table] == [1.05, 2.5, 5.0, 1.0]
    path.write_text(path.read_text().replace(rows.title, "Speed, cpu, another processor"))
    assert bench.Rows(cfg).tables == {}                    # rows of two machines do not mix


def test_the_peak_of_memory_is_seen():
    assert bench.peak_memory(lambda: torch.ones(5_000_000)) == 20_000_000          # freed at once
    assert 0 <= bench.peak_memory(lambda: torch.ones(5_000_000) * 2) - 40_000_000 < 1000
    assert bench.peak_memory(lambda: None) == 0


def test_an_unknown_measurement_is_refused():
    with pytest.raises(ValueError, match="no such measurement: speed; there are lm, growth"):
        bench.main(["--only=speed"])
