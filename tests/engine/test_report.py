"""Signals; the log and, where it is asked for, tensorboard: the same numbers in both."""

import builtins
import json
import signal
from types import SimpleNamespace

import pytest
import torch

from engine import distributed
from engine.progress import Log, StopSignal, open_board
from model import ConanConfig

WORLD = SimpleNamespace(is_main=True, size=1, mean=lambda numbers: numbers,
                        device=torch.device("cpu"))


def run(folder, steps, start=0, **keys):
    cfg = SimpleNamespace(run_dir=folder, steps=4, stage="sft", log_every=1, **keys)
    log = Log(cfg, WORLD, start)
    for step in range(start, steps):
        batch = SimpleNamespace(ids=[0] * 8, lengths=[3, 5], task="sft", targets=None)
        log.step(step, batch, {"loss": 3.0 - step / 2}, 0.0, {"lr": 0.25, "alpha": None})
    log.close()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_only_a_second_ctrl_c_does_not_wait_for_the_save():
    before, stop = signal.getsignal(signal.SIGTERM), StopSignal()
    try:
        assert not stop.raised
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):     # a launcher's, another's
            signal.raise_signal(number)
            assert stop.raised and stop.number == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_being_asked_there_is_no_board(tmp_path):
    rows = run(tmp_path, 3)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.0), (2, 2.5), (3, 2.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    run(tmp_path, 3, tensorboard=False)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_chips_of_known_speed_show_their_mfu(tmp_path, monkeypatch):
    chip = SimpleNamespace(get_device_name=lambda index: "NVIDIA H200", is_available=lambda: True)
    monkeypatch.setattr(torch, "cuda", chip)
    assert distributed.peak_flops(torch.device("cuda", 0)) == 989e12
    assert distributed.peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(distributed, "peak_flops", lambda device: 1e6)
    now = iter(range(100))
    monkeypatch.setattr("engine.progress.time.perf_counter", lambda: float(next(now)))
    shape = ConanConfig(vocab_size=10, n_layer=1, n_head=1, n_kv_head=1, n_embd=2, ffn_dim=4)
    row = run(tmp_path, 1, model_config=lambda: shape)[0]
    # weights: attention 4 * 4, FFN 3 * 2 * 4; 6 FLOPs each for 8 tokens; attention 12 D T^2
    assert row["mfu"] == pytest.approx((6 * 40 * 8 + 12 * 2 * (9 + 25)) / 1.0 / 1e6)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        open_board(tmp_path, 0)


@pytest.mark.extras
def test_the_board_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(tmp_path, 3, tensorboard=True)
    rows = run(tmp_path, 4, start=2, tensorboard=True)             # killed after step 3, from 2 on
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.0), (2, 2.5), (3, 2.0), (4, 1.5)]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 3.0), (2, 2.5), (3, 2.0),
                                                                  (4, 1.5)]
    assert sorted(board.Tags()["scalars"]) == ["data_share", "loss", "lr", "tokens_per_second"]
