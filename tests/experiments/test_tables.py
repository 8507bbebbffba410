"""Figures from a run's files: the right numbers are drawn, and what is missing is said.

    pip install matplotlib && pytest -m extras tests/test_tables.py     # the drawing itself
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from data import PROMPTS
from engine import checkpoint
from experiments import tables
from experiments.tables import Missing, Run, TablesConfig, by_task, mrl_curves, recorded
from mask import FULL, effective_rank, rank_law, soft_mask
from model import Conan, ConanConfig
from tokenizer import Tokenizer

DOCS = "retrieval/installed_docs/test/ndcg@10"
WEAK = {DOCS: 0.5}
SUP = {DOCS: 0.6, f"{DOCS}:8": 0.4, f"{DOCS}:4": 0.3, "retrieval/clr/mean/ndcg@10:8": 0.2,
       "retrieval/clr/zh-en/ndcg@10:8": 0.1, "retrieval/clr/all/ndcg@10:8": 0.15,
       "retrieval/clr/mean/recall@1:8": 0.9, "dhnm/clr/queries_changed_0_times": 5}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def save(out, stage, docs="", width=16):
    """Write a tiny checkpoint as train.py does; return its number of weights."""
    (out / stage).mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(["the rank of a matrix, sorted lists and words"] * 2, 290)
    tokenizer.save(out / "tokenizer.tiktoken")
    config = ConanConfig(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, n_embd=width,
                         ffn_dim=16, block_size=64)
    model = Conan(config).init_weights(torch.Generator().manual_seed(len(stage)))
    checkpoint.save(out / stage, 40, {
        "model.pt": model.state_dict(),
        "tokenizer.tiktoken": (out / "tokenizer.tiktoken").read_bytes(),
        "config.json": json.dumps({
            "model": dataclasses.asdict(config), "mask": dataclasses.asdict(FULL), "step": 40,
            "passage_len": 32, "prompts": PROMPTS, "versions": {},
            "train": {"stage": stage, "docs": str(docs), "schedule": "linear", "mask_axis": "row",
                      "passage_len": 32}})})
    return model.count_params()


@pytest.fixture
def out(tmp_path):
    """A whole run: logs, scores, checkpoints of both embedding stages, summary, texts."""
    out = tmp_path / "run"
    for stage in ("pretrain", "sft"):
        write(out / stage / "log.jsonl", [{"step": 10, "task": stage, "loss": 3.0, "alpha": 0.0}])
    write(out / "embed_weak" / "log.jsonl", [
        {"step": s, "task": "pairs", "loss": 50 / s, "alpha": s / 40} for s in (10, 20, 30, 40)])
    write(out / "embed_sup" / "log.jsonl", [
        {"step": 10, "task": "clr", "loss": 2.0, "replaced": 7, "exhausted": 0, "S": 0.3,
         "S_0": 0.3},
        {"step": 20, "task": "sts", "loss": 9.0},
        {"step": 30, "task": "clr", "loss": 1.0, "replaced": 2, "exhausted": 1, "S": 0.2,
         "S_0": 0.4}])
    write(out / "embed_weak" / "eval.json", WEAK)
    write(out / "embed_sup" / "eval.json", SUP)
    write(out / "summary.json", {"minutes": 1, "BM25": {DOCS: 0.7}, "embed_sup": SUP})
    write(tmp_path / "docs" / "clr_test" / "queries.jsonl", [
        {"id": f"{i}/{lang}", "lang": lang, "text": f"{lang} matrix {i}"}
        for i in range(8) for lang in ("en", "de", "zh")])
    for stage in ("embed_weak", "embed_sup"):
        save(out, stage, tmp_path / "docs")
    return out


@pytest.fixture
def cfg(out, tmp_path):
    return TablesConfig(out=(str(out),), results=str(tmp_path / "results"),
                        figures=str(tmp_path / "figures"))


# ---------------------------------------------------------------- reading

def test_curves_of_a_log_go_by_task(out):
    rows = Run(out).log("embed_sup")
    assert by_task(rows, "S_0") == {"clr": ([10, 30], [0.3, 0.4])}
    assert by_task(rows, "loss") == {"clr": ([10, 30], [2.0, 1.0]), "sts": ([20], [9.0])}
    assert by_task(rows, "alpha") == {}


def test_a_last_line_that_was_cut_off_is_left_out(out):
    with open(out / "embed_sup" / "log.jsonl", "a") as file:
        file.write('{"step": 40, "los')
    assert [row["step"] for row in Run(out).log("embed_sup")] == [10, 20, 30]


def test_mrl_takes_the_mean_of_a_set_in_several_languages_and_sorts_dims():
    assert mrl_curves(SUP) == {"installed_docs, test": {4: 0.3, 8: 0.4}, "clr, mean": {8: 0.2}}
    assert mrl_curves(WEAK) == {}


def test_recorded_scores_are_those_of_eval(tmp_path):
    write(tmp_path / "minilm.json", {DOCS: 0.1, "model/minilm/all/parameters": 22})
    write(tmp_path / "default_run.json", {"minutes": 8, "BM25": {DOCS: 0.7}})
    write(tmp_path / "list.json", [[1]])
    assert list(recorded(tmp_path)) == ["minilm"] and recorded(tmp_path / "none") == {}


def test_figure_1_has_runs_baselines_and_what_has_no_size(out, tmp_path):
    small = tmp_path / "small"
    size = save(small, "embed_weak", width=8)
    write(small / "embed_weak" / "eval.json", {DOCS: 0.25})
    write(tmp_path / "results" / "stock.json", {DOCS: 0.8, "model/stock/all/parameters": 123})
    write(tmp_path / "results" / "lexical.json", {DOCS: 0.65})
    write(tmp_path / "results" / "other.json", {"sts/a/en/spearman": 0.65})
    sized, flat, where = tables.sizes_and_scores([Run(out), Run(small)], tmp_path / "results")
    whole = Run(out).parameters("embed_sup")
    assert where == DOCS and whole > size
    assert sized == {f"{out}/embed_weak": (whole, 0.5), f"{out}/embed_sup": (whole, 0.6),
                     f"{small}/embed_weak": (size, 0.25), "stock": (123, 0.8)}
    assert flat == {"BM25": 0.7, "lexical": 0.65}
    sized, _, _ = tables.sizes_and_scores([Run(out)], tmp_path / "none")
    assert list(sized) == ["embed_weak", "embed_sup"]


@pytest.mark.parametrize(("draw", "gone", "message"), [
    ("loss", "sft/log.jsonl", r"sft/log.jsonl is missing; make it by: python train.py "
                              r"config/sft.py --out=\S+run$"),
    ("mask", "embed_weak/log.jsonl", "python train.py config/embed_weak.py"),
    ("mask", "embed_weak/step_000040", "embed_weak has no checkpoint; make it by"),
    ("dhnm", "embed_sup/log.jsonl", "python train.py config/embed_sup.py"),
    ("mrl", "embed_sup/eval.json", "python train.py config/embed_sup.py"),
    ("figure3", "../docs/clr_test/queries.jsonl", "--texts=FILE, or make it by: python train.py")])
def test_what_is_missing_is_said_with_its_command(out, cfg, draw, gone, message):
    path = out / gone
    path.rename(path.with_name("gone"))
    with pytest.raises(Missing, match=message):
        tables.FIGURES[draw](cfg, [Run(out)])


def test_scores_that_hold_no_dims_or_no_negatives_are_missing_too(out, cfg):
    write(out / "embed_sup" / "eval.json", WEAK)
    with pytest.raises(Missing, match="--dims=64,128,256,512"):
        tables.draw_mrl(cfg, [Run(out)])
    write(out / "embed_sup" / "log.jsonl", [{"step": 1, "task": "sts", "loss": 1.0}])
    with pytest.raises(Missing, match="has hard negatives; train with retrieval"):
        tables.draw_dhnm(cfg, [Run(out)])
    (out / "embed_sup" / "log.jsonl").write_text("")
    with pytest.raises(Missing, match="log.jsonl is empty; go on with"):
        tables.draw_dhnm(cfg, [Run(out)])
    for stage in ("embed_weak", "embed_sup"):
        write(out / stage / "eval.json", {"sts/a/en/spearman": 0.5})
    with pytest.raises(Missing, match="no stage of .* has a ndcg@10"):
        tables.draw_figure1(cfg, [Run(out)])


def test_the_default_run_needs_no_flag_in_the_command():
    assert Run("out").command("sft") == "python train.py config/sft.py"


def test_the_readme_quotes_what_the_exercises_gave():
    root = Path(tables.__file__).parent.parent
    found = json.loads((root / "results" / "exercises.json").read_text())
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = dict(zip(found, re.findall(r"^\| \d\. .*$", text, re.M), strict=True))
    seen = {name: values["ndcg@10"] for name, values in found.items()}
    a, linear = found["schedule"]["alpha_at_step_40"], found["schedule"]["ndcg@10_linear"]
    logits, dhnm, before = found["logits"], found["dhnm"], found["language"]["ndcg@10_before"]
    assert f"alpha is {a:.2f}, not {39 / 79:.2f}" in rows["schedule"]
    assert f"of M {rank_law(64, a)} of 64, not {rank_law(64, 39 / 79)}." in rows["schedule"]
    assert f"nDCG@10 {seen['schedule']:.2f}, linear {linear:.2f}" in rows["schedule"]
    assert (f"loss {logits['loss_of_steps_41_to_60']:.1f} in steps 41 to 60 (the soft mask: "
            f"{logits['loss_of_steps_41_to_60_weights']:.1f}), nDCG@10 {seen['logits']:.2f} "
            f"({logits['ndcg@10_weights']:.2f})") in rows["logits"]
    assert (f"from `S_0` = {dhnm['S_0_from_step_94']['fixed']:.2f} to "
            f"{dhnm['S_from_step_94']['fixed']:.2f}, the loss to "
            f"{dhnm['loss_from_step_90']['fixed']:.2f}") in rows["dhnm"]
    low, high = dhnm["replaced_in_steps_50_to_98"]["v2"]
    assert f"v2: {low} to {high} `replaced`" in rows["dhnm"]
    assert (f"`S` is {dhnm['S_from_step_94']['v2']:.2f}; nDCG@10 {seen['dhnm']['fixed']:.2f} and "
            f"{seen['dhnm']['v2']:.2f}") in rows["dhnm"]
    assert (f"nDCG@10 {seen['pairs']['pretrain']:.2f} after pretraining, "
            f"{seen['pairs']['embed_weak']:.2f} after stage 3, BM25 "
            f"{seen['pairs']['BM25']:.2f}") in rows["pairs"]
    assert (f"{seen['language']['xx-en']:.2f} ({before['xx-en']:.2f} before; `zh-en` "
            f"{seen['language']['zh-en']:.2f} from {before['zh-en']:.2f})") in rows["language"]
    for name, values in found.items():
        assert all(flag in rows[name] or name == "logits" or flag == "--out=out/mine"
                   for flag in values["command"].split()), name


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize(("argv", "message"), [
    ([], "one of the commands figures"), (["fig"], "not fig"), (["figures", "x"], "figures x"),
    (["figures", "--ouut=x"], "nearest is 'out'")])
def test_wrong_arguments_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        tables.main(argv)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, cfg):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        tables.figures(cfg)


# ---------------------------------------------------------------- drawing

def points(plot, label=None):
    """Return the (x, y) lists of a plot's lines, or of the line with a label."""
    lines = [line for line in plot.lines if label in (None, line.get_label())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


@pytest.mark.extras
def test_the_rank_that_is_drawn_is_the_law(out, cfg):
    pytest.importorskip("matplotlib")
    figure = tables.draw_mask(cfg, [Run(out)])
    alphas = [0.25, 0.5, 0.75, 1.0]
    assert points(figure.axes[0]) == [([10, 20, 30, 40], alphas)]
    assert points(figure.axes[1], "rank") == [
        ([10, 20, 30, 40], [rank_law(32, a) for a in alphas])] == [([10, 20, 30, 40],
                                                                   [24, 16, 8, 1])]
    assert points(figure.axes[1], "effective rank")[0][1] == pytest.approx(
        [effective_rank(soft_mask(32, a)) for a in alphas])


@pytest.mark.extras
def test_the_numbers_of_the_files_are_drawn(out, cfg):
    pytest.importorskip("matplotlib")
    runs = [Run(out)]
    replaced, exhausted, cosines = tables.draw_dhnm(cfg, runs).axes
    assert points(replaced) == [([10, 30], [7, 2])] and points(exhausted) == [([10, 30], [0, 1])]
    assert points(cosines) == [([10, 30], [0.3, 0.2]), ([10, 30], [0.3, 0.4])]
    (mrl,) = tables.draw_mrl(cfg, runs).axes
    assert points(mrl, "installed_docs, test") == [([4, 8], [0.3, 0.4])]
    assert ([0, 1], [0.7, 0.7]) in points(mrl)                     # BM25
    (size,) = tables.draw_figure1(cfg, runs).axes
    n = runs[0].parameters("embed_sup")
    assert points(size) == [([n], [0.5]), ([n], [0.6]), ([0, 1], [0.7, 0.7])]
    assert size.get_ylim() == pytest.approx((0, 1.05 * 0.7))       # room above the best
    assert len({line.get_marker() for line in size.lines[:2]}) == 2
    assert [points(plot) for plot in tables.draw_loss(cfg, runs).axes] == [
        [([10], [3.0])], [([10], [3.0])], [([10, 20, 30, 40], [5.0, 2.5, 50 / 30, 1.25])],
        [([10, 30], [2.0, 1.0]), ([20], [9.0])]]


@pytest.mark.extras
def test_figure_3_draws_every_text_before_and_after(out, cfg):
    pytest.importorskip("matplotlib")
    before, after = tables.draw_figure3(cfg, [Run(out)]).axes
    for plot, title in ((before, "before CLR"), (after, "after CLR")):
        dots = {c.get_label(): c.get_offsets() for c in plot.collections}
        assert plot.get_title().startswith(title) and dots.keys() == {"en", "de", "zh"}
        assert all(len(xy) == 8 for xy in dots.values())
    a, b = (plot.collections[0].get_offsets() for plot in (before, after))
    assert abs(a - b).max() > 1e-4                     # two models, not one twice


@pytest.mark.extras
def test_the_command_writes_small_pictures_and_names_the_rest(out, cfg, capsys):
    pytest.importorskip("matplotlib")
    flags = [f"--out={out}", f"--results={cfg.results}", f"--figures={cfg.figures}"]
    tables.main(["figures", *flags])
    written = sorted((out.parent / "figures").iterdir())
    assert [path.stem for path in written] == sorted(tables.FIGURES)
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < tables.LARGEST, path
    assert "large for git" not in capsys.readouterr().out
    (out / "embed_weak" / "log.jsonl").unlink()
    tables.main([*flags, "figures"])
    shown = capsys.readouterr().out
    assert shown.count("not drawn") == 2 and f"config/embed_weak.py --out={out}" in shown
    with pytest.raises(ValueError, match="nothing was made"):
        tables.main(["figures", f"--out={out}/none", f"--figures={cfg.figures}"])
