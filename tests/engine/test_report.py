"""Signals, the log of a resumed run, what is said of a stage's tasks, tables of scores."""
import json
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch

from engine import distributed, report
from engine.report import Log, StopSignal
from model import ConanConfig
from train import STAGES

WORLD = SimpleNamespace(is_main=True, size=1, mean=lambda numbers: numbers,
                        device=torch.device("cpu"))


def config(folder, **keys):
    return SimpleNamespace(**{**dict(run_dir=folder, steps=4, stage="embed_sup", log_every=1,
                                     n_negatives=3, dhnm="v2", task_weights={}), **keys})


def run(folder, steps, start=0, **keys):
    log = Log(config(folder, **keys), WORLD, start)
    for step in range(start, steps):
        batch = SimpleNamespace(ids=[0] * 8, lengths=[3, 5], task="sft", targets=None)
        log.step(step, batch, {"loss": 3.0 - step / 2}, 0.0, {"lr": 0.25, "alpha": None})
    log.close(0)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_only_a_second_ctrl_c_does_not_wait_for_the_save():
    before, stop = signal.getsignal(signal.SIGTERM), StopSignal()
    try:
        assert not stop.number
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):     # a launcher's, another's
            signal.raise_signal(number)
            assert stop.number == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    try:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.number
    finally:
        stop.restore()
        assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_the_log_has_a_line_every_few_steps_and_one_for_the_last(tmp_path):
    lines = run(tmp_path, 4)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, 2.5), (3, 2.0),
                                                                (4, 1.5)]
    assert set(lines[0]) == {"step", "task", "loss", "lr", "alpha", "tokens_per_second",
                             "data_share"}
    (tmp_path / "log.jsonl").unlink()
    assert [line["step"] for line in run(tmp_path, 4, log_every=3)] == [3, 4]


@pytest.mark.parametrize("step, left", [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_a_resumed_log_holds_each_step_once(tmp_path, step, left):
    path, lines = tmp_path / "log.jsonl", [f'{{"step": {i}, "loss": 1.5}}\n' for i in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')      # killed while it wrote
    with report.open_log(path, step) as file:
        file.write("new\n")
    assert path.read_text() == "".join(lines[:left]) + "new\n"


@pytest.mark.parametrize("line", ['{"stop": 2}', '{"st\x00ep": 2}', "[]"])
def test_a_damaged_line_of_a_log_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=f"^{tmp_path / 'log.jsonl'}:2: damaged, "):
        report.open_log(tmp_path / "log.jsonl", 3)


def test_chips_of_known_speed_show_their_mfu(tmp_path, monkeypatch):
    chip = SimpleNamespace(get_device_name=lambda index: "NVIDIA H200", is_available=lambda: True)
    monkeypatch.setattr(torch, "cuda", chip)
    assert distributed.peak_flops(torch.device("cuda", 0)) == 989e12
    assert distributed.peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(distributed, "peak_flops", lambda device: 1e6)
    now = iter(range(100))
    monkeypatch.setattr(report.time, "perf_counter", lambda: float(next(now)))
    shape = ConanConfig(vocab_size=10, n_layer=1, n_head=1, n_kv_head=1, n_embd=2, ffn_dim=4)
    line = run(tmp_path, 1, model_config=lambda: shape)[0]
    # weights: attention 4 * 4, FFN 3 * 2 * 4; 6 FLOPs each for 8 tokens; attention 12 D T^2
    assert line["mfu"] == pytest.approx((6 * 40 * 8 + 12 * 2 * (9 + 25)) / 1.0 / 1e6)


@pytest.mark.parametrize("steps, dhnm, warns", [(8, "v2", True), (16, "v2", False),
                                                (8, "fixed", False)])
def test_a_stage_that_visits_no_query_twice_says_that_dhnm_cannot_act(tmp_path, capsys, steps,
                                                                      dhnm, warns):
    """PAPER Sec. 3.4: a replacement is used at its query's next visit."""
    def task(kind, rows, size, pool):
        return SimpleNamespace(kind=kind, rows=range(rows), size=size, pool=pool)
    cfg = config(tmp_path, steps=steps, dhnm=dhnm)
    report.print_tasks(cfg, [(task("retrieval", 80, 16, SimpleNamespace(depth=4)), 3.0),
                             (task("sts", 2000, 32, None), 1.0)])
    shown = capsys.readouterr().out
    share = steps * 3 / 4
    assert f"retrieval: 80 rows, 64 candidates a query, about {share:.0f} steps of 16, " \
           f"{share * 16 / 80:.1f} visits a row{': too few for DHNM' * warns}\n" in shown
    assert f"sts: 2,000 rows, about {steps / 4:.0f} steps of 32" in shown
    assert shown.count("DHNM") == warns            # sts has no hard negatives
    cfg.task_weights = {"retrieval": 1.0, "clr": 3.0, "classification": 0.0, "sts": 1.0}
    report.print_tasks(cfg, [(task("clr", 80, 16, SimpleNamespace(depth=3)), 1.0)])
    shown = capsys.readouterr().out
    assert ("warning: clr: DHNM cannot act, since no query has more than the 3 candidates" in
            shown) == (dhnm == "v2")
    assert {line for line in shown.splitlines() if line.endswith("no data, left out")} == {
        f"{kind}: no data, left out" for kind in ("retrieval", "sts")}


def test_the_weak_stages_tasks_have_the_names_of_their_files(tmp_path, capsys):
    class Rows(list):
        files = [SimpleNamespace(path=tmp_path / "pairs/a.jsonl")]
    rows = Rows(range(8))
    task = SimpleNamespace(kind="pairs", rows=rows, size=4, pool=None)
    report.print_tasks(config(tmp_path, stage="embed_weak"), [(task, 1.0)])
    assert capsys.readouterr().out == \
        "a.jsonl: 8 rows, 4 candidates a query, about 4 steps of 4, 2.0 visits a row\n"


def test_the_bar_of_stage_4_names_the_task_of_a_loss(tmp_path, capsys):
    run(tmp_path, 1)
    assert "sft loss 3.00" in capsys.readouterr().err
    run(tmp_path, 1, stage="pretrain")
    assert "step/s, loss 3.00" in capsys.readouterr().err


def test_the_summary_shows_stages_dims_and_languages(capsys):
    name = "retrieval/my-docs/test"             # "my-docs" is not a pair of languages
    scores = {"BM25": {f"{name}/{m}": 0.25 for m in ("ndcg@10", "recall@1", "recall@10")},
              "embed_sup": {f"{name}/{m}{dim}": value for dim, value in (("", 0.5), (":8", 0.375))
                            for m in ("ndcg@10", "recall@1", "recall@10")}
              | {"retrieval/clr/zh-Hant-en/ndcg@10": 0.25, "retrieval/clr/de-en/ndcg@10": 0.75,
                 "retrieval/own/de-en/ndcg@10": 0.5,
                 "sts/set/test/spearman": 0.625}
              | {f"retrieval/clr/{part}/{m}": 0.5 for part in ("all", "mean")
                 for m in ("ndcg@10", "recall@1", "recall@10")}}
    report.print_summary(scores, (8, 16))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert rows[:4] == [[name, "ndcg@10", "recall@1", "recall@10"],
                        ["BM25", *["0.250"] * 3], ["embed_sup", *["0.500"] * 3],
                        ["embed_sup,", "first", "8", "dims", *["0.375"] * 3]]
    assert rows[4:6] == [["sts/set/test", "spearman"], ["embed_sup", "0.625"]]
    assert rows[6][0] == "retrieval/clr/mean" and len(rows) == 13     # not "all" as well
    assert rows[8:] == [["retrieval/clr,", "ndcg@10", "BM25", "embed_sup"], ["de-en", "0.75"],
                        ["zh-Hant-en", "0.25"],
                        ["retrieval/own,", "ndcg@10", "BM25", "embed_sup"], ["de-en", "0.50"]]


def test_of_retrieval_the_main_metrics_are_shown():
    shown = report.table({"retrieval/x/test/ndcg@10": 0.5, "retrieval/x/test/map": 0.25,
                          "sts/x/test/spearman": 0.75, "retrieval/x/test/ndcg@10:8": 0.125})
    assert [line.split() for line in shown.splitlines()] == [
        ["retrieval/x/test", "ndcg@10", "0.5000"], ["sts/x/test", "spearman", "0.7500"],
        ["retrieval/x/test,", "8", "dims", "ndcg@10", "0.1250"]]


@pytest.mark.parametrize("trained", [True, False])
def test_the_summary_has_no_stage_after_the_one_that_was_asked_for(tmp_path, trained):
    (tmp_path / "summary.json").write_text('{"minutes": 7.0, "embed_sup": {}}')
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "eval.json").write_text('{"lm/x/dev/loss": 1.0}')
    cfg = SimpleNamespace(out=str(tmp_path), dims=(), stage="sft", run_dir=tmp_path / "sft")
    report.summarise(cfg, STAGES, {}, 1.0, trained)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [name for name in summary if name in STAGES] == ["pretrain", "sft"]
    assert summary["minutes"] == (1.0 if trained else 7.0)


def test_the_search_that_is_shown_can_be_pasted(tmp_path, capsys):
    """With this run's model, and the collection that was named; the width is no cut."""
    out, own = tmp_path / "my run", tmp_path / "my docs"
    for path in (own, tmp_path / "data/search", out / "embed_sup"):
        path.mkdir(parents=True)
        (path / "corpus.jsonl").touch()
    (out / "embed_sup/eval.json").write_text(json.dumps({
        f"retrieval/my docs/all/{m}{dim}": 0.5 for m in report.SHOWN for dim in ("", ":4", ":8")}))
    cfg = SimpleNamespace(out=str(out), run_dir=out / "embed_sup", stage="embed_sup", dims=(4, 8),
                          n_embd=8, evaluate=(str(own),), data=str(tmp_path / "data"))
    report.summarise(cfg, STAGES, {}, 1.0, True)
    shown = capsys.readouterr().out
    assert shlex.split(shown.split("search: ")[1])[:4] == [
        "python", "embed.py", f"--checkpoint={cfg.run_dir}", f"--corpus={own}"]
    assert "first 4 dims" in shown and "first 8 dims" not in shown


@pytest.mark.parametrize("name", ["embed_weak/eval.json", "summary.json"])
def test_a_damaged_file_of_scores_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"minutes": 1')
    with pytest.raises(ValueError, match=f"{name}: no JSON object: "):
        report.summarise(SimpleNamespace(out=str(tmp_path), dims=(), stage="embed_sup"), STAGES, {},
                         1.0, False)
    assert path.read_text() == '{"minutes": 1'


def test_rates_are_those_of_the_steps_since_the_last_line(tmp_path, monkeypatch):
    now = iter(range(0, 99, 4))                            # four seconds from look to look
    monkeypatch.setattr(report.time, "perf_counter", lambda: float(next(now)))
    world = SimpleNamespace(**{**vars(WORLD), "size": 2, "mean": lambda _: {"loss": 0.75}})
    log = Log(config(tmp_path, log_every=2), world, 0)
    for step in range(4):
        batch = SimpleNamespace(ids=[0] * 4 * (1 + step), lengths=[8], task="sft", targets=None)
        log.step(step, batch, {"loss": 1.0}, 0.25 * (1 + step), {})
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]     # a kill loses none
    log.close(0)
    # (4 + 8) tokens on 2 ranks, and 0.75 seconds of reading, in 4 seconds; then (12 + 16), 1.75
    assert [(row["tokens_per_second"], row["data_share"]) for row in rows] == [
        (6, 0.1875), (14, 0.4375)]
    assert [row["loss"] for row in rows] == [0.75] * 2     # of all ranks
