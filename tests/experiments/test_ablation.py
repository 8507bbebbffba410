"""The ablation: what cells share and differ in, resumption, tiny tables from the command line."""
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

import train
from engine.jsonl import read_jsonl, write_jsonl
from experiments import ablation, cells
from experiments.ablation import (TABLE_4, TABLE_12,
                                  AblationConfig)
from experiments.cells import (EVERYTHING, NOTHING, PRETRAIN, SFT, SUP, TUNING_SEED, WEAK, Cell,
                               Lab, columns, table4_cell, write_clr)
from experiments.results import cells_lines
from experiments.runs import read_scores, seconds, write_result


@pytest.fixture
def cfg(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")         # else train.py takes every core
    return AblationConfig(config=str(home.config), data=str(home.data), weak_steps=0, sup_steps=0,
                          work=str(tmp_path / "work"), results=str(tmp_path / "results"),
                          seeds=(0, 1), tune=False)


def command(cfg, name, *more):
    """Run a command of the ablation; return its table."""
    flags = [f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for key, value in dataclasses.asdict(cfg).items() if value != ""]
    return json.loads(ablation.main([name, *flags, *more]).read_text())


# ---------------------------------------------------------------- numbers by hand

def test_columns_are_means_over_languages():
    scores = {f"retrieval/clr_test/{pair}/ndcg@10": value for pair, value in (
        ("en-en", 0.5), ("zh-en", 0.1), ("de-en", 0.3), ("de-zh", 0.9), ("all", 0.9))}
    scores |= {"retrieval/clr_test/de-en/ndcg@10:64": 1.0, "retrieval/docs/test/recall@1": 1.0,
               "retrieval/docs/test/ndcg@10": 0.6}
    assert columns(scores) == pytest.approx({"Multi": 20, "Eng": 60, "Zh": 10})
    with pytest.raises(ValueError, match="scores of no languages -> English: zh and a collection"):
        columns({"retrieval/clr_test/en-en/ndcg@10": 0.5})


def test_standing_still_is_the_longest_way_without_a_new_minimum():
    log = [{"loss": loss, "grad_norm": 1.0} for loss in (4, 3, 2, 2, 2, 2, 1, 0.5, 0.4, 0.3)]
    measures = ablation.after_switch(log)
    assert measures["Longest stand, steps"] == 4       # from step 3 to step 7
    assert (measures["Loss, first tenth"], measures["Loss, last tenth"]) == (4, 0.3)


def test_seconds_of_a_step_come_from_its_tokens():
    log = [{"tokens": 100, "tokens_per_second": 50}, {"tokens": 160, "tokens_per_second": 30}]
    assert seconds(log) == [2, 2]


# ---------------------------------------------------------------- what cells share

def differing(a, b):
    a, b = dataclasses.asdict(a), dataclasses.asdict(b)
    return {key for key in a if a[key] != b[key]} - {"out", "previous"}


def test_cells_differ_in_the_named_settings_and_in_no_other(cfg):
    lab = Lab(cfg)
    named = {"SM": (WEAK, SUP, {"schedule"}), "CLR": (SUP, SUP, {"task_weights"}),
             "DHNM": (SUP, SUP, {"dhnm"})}
    for key in TABLE_4.values():
        for place, (first, last, settings) in enumerate(named.values()):
            other = tuple(not on if i == place else on for i, on in enumerate(key))
            for stage in (WEAK, SUP):
                pair = [lab.settings(0, stage, table4_cell(*k)) for k in (key, other)]
                assert differing(*pair) == (settings if stage in (first, last) else set())
    base = lab.settings(0, WEAK, TABLE_12["linear"])
    assert [differing(base, lab.settings(0, WEAK, cell)) for cell in TABLE_12.values()] == [
        set(), {"schedule"}, {"schedule"}, {"schedule"}, {"schedule"}, {"mask_axis"},
        {"mask_apply"}, {"pooling"}, {"schedule", "pooling"}]
    weights = [lab.settings(0, SUP, cell).task_weights for cell in (NOTHING, EVERYTHING)]
    assert weights == [{"retrieval": 1.0}, {"retrieval": 1.0, "clr": 1.0}]


def test_each_stage_can_be_shortened_for_a_look(cfg):
    lab = Lab(dataclasses.replace(cfg, lm_steps=3, weak_steps=2, sup_steps=6))
    assert {stage: base.steps for stage, base in lab.base.items()} == {
        PRETRAIN: 3, SFT: 2, WEAK: 2, SUP: 6}
    assert lab.lm_folder(0, Cell()).name == "lm0-3"


def test_cells_share_language_models_and_stage_3(cfg):
    lab = Lab(cfg)
    grid = [table4_cell(*key) for key in TABLE_4.values()]
    assert len({lab.settings(0, SUP, cell).out for cell in grid}) == 8
    assert len({lab.settings(0, SUP, cell).previous for cell in grid}) == 2
    lms = [lab.settings(seed, WEAK, NOTHING).previous for seed in range(4)]
    assert lms[0] == lms[2] != lms[1] == lms[3]
    assert lab.settings(3, SFT, NOTHING).seed == 1 and lab.settings(3, WEAK, NOTHING).seed == 3


def test_a_shorter_stage_1_is_the_beginning_of_the_longest(cfg):
    """The rate of each step is that of the same step of the longest run, also in the warm-up."""
    lab = Lab(cfg)
    whole = lab.settings(0, PRETRAIN, Cell())          # 4 steps, 2 of them warm-up
    for steps in (1, 2, 3):
        part = lab.settings(0, PRETRAIN, Cell(lm_steps=steps))
        assert part.steps == steps and part.out != whole.out
        assert [train.lr_at(s, part) for s in range(steps)] == pytest.approx(
            [train.lr_at(s, whole) for s in range(steps)])
    assert lab.settings(0, WEAK, Cell(lm_steps=0)).previous == ""


def test_a_cells_folders_are_those_of_what_it_shares():
    cell = Cell(mask_axis="col", clr=True, sup_rate=0.5)
    assert cell.folder(WEAK) == "linear-mask_axis=col"
    assert cell.folder(SUP) == "linear-mask_axis=col-clr=True-sup_rate=0.5"
    assert Cell(lm_steps=0).folder(WEAK) == "linear-lm_steps=0"


def test_other_settings_in_the_same_folder_are_refused(cfg):
    Lab(cfg).train(0, SFT, NOTHING)
    lab = Lab(cfg)
    lab.base[SFT] = dataclasses.replace(lab.base[SFT], steps=9)
    with pytest.raises(ValueError, match="sft.py: this stage has other settings now"):
        lab.train(0, SFT, NOTHING)


# ---------------------------------------------------------------- tiny tables

def test_table_4_from_the_command_line_is_trained_once(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "TABLE_4", {
        k: TABLE_4[k] for k in ("nothing", "SM", "CLR", "DHNM")})
    cfg = dataclasses.replace(cfg, seeds=(1,))
    table = command(cfg, "table4")
    assert table["seeds"] == [1] and table["settings"]["CLR"]["clr"]
    score = table["cells"]["SM"]["1"]
    folder = tmp_path / "work/seed1/linear/embed_sup"
    assert score == columns(read_scores(folder)) and score.keys() == {"Multi", "Eng", "Zh"}
    probed = Lab(cfg).measure(folder)                  # what Tables 6 and 12 report
    assert probed.keys() == score.keys() | {"Order", "First third", "Last third", "LM loss",
                                            "Numbers", "Rank"}
    assert 1 <= probed["Rank"] <= 32
    assert table["differences"]["SM: with minus without"] == [["SM"], ["nothing", "CLR", "DHNM"]]
    assert table["paper"]["SM"] == {"Multi": 61.73, "Eng": 70.41, "Zh": 70.99}
    assert set(table["language_models"]) == {"lm1-4"}
    monkeypatch.setattr(train, "train", None)          # another training would raise TypeError
    assert command(cfg, "table4") == table
    assert command(cfg, "table4", "--cells=SM,nothing") == table       # the other rows stay
    assert table["command"] == ("python -m experiments.ablation table4 --seeds=1 "
                                f"--config={cfg.config} --data={cfg.data} --weak_steps=0 "
                                "--sup_steps=0 --tune=False")
    part = command(cfg, "table4", "--cells=SM,nothing", f"--results={tmp_path / 'part'}")
    assert " --cells=nothing,SM " in part["command"]
    assert list(part["cells"]) == ["nothing", "SM"] and not part["differences"]
    with pytest.raises(ValueError, match="table4 has no row 'odd'; its rows are nothing, SM"):
        command(cfg, "table4", "--cells=odd")


def test_seeds_are_added_to_a_table_and_other_settings_refused(cfg, tmp_path, monkeypatch):
    lab = Lab(cfg)
    monkeypatch.setattr(lab, "train", lambda seed, stage, cell: seed + len(cell.schedule))
    monkeypatch.setattr(ablation, "language_model", lambda lab, lm: {"tokens": 1, "loss": 1.0})

    def table(seeds, cells=("a", "b"), **changed):
        lab.cfg = dataclasses.replace(cfg, seeds=seeds, cells=cells)
        grid = {"a": Cell(), "b": Cell("hard"), "c": Cell("causal", **changed)}
        return json.loads(ablation.make_table(
            lab, "t", grid, measure=lambda folder: {"x": folder},
            differences={"b - a": (["b"], ["a"]), "c - a": (["c"], ["a"])}).read_text("utf-8"))

    table((2, 10))
    both = table((1,), ("c", "a"))
    assert both["cells"] == {"a": {str(s): {"x": s + 6} for s in (1, 2, 10)},
                             "b": {str(s): {"x": s + 4} for s in (2, 10)}, "c": {"1": {"x": 7}}}
    assert both["seeds"] == [1, 2, 10] and set(both["differences"]) == {"b - a", "c - a"}
    assert set(both["language_models"]) == {"lm0-4", "lm1-4"} and len(both["versions"]) == 1
    lines = "\n".join(cells_lines(both))
    assert "| b (2 seeds) |" in lines and "| a |" in lines and "| c - a (1 seed) |" in lines
    for settings in both["settings"].values():         # a file of before Cell had this field
        del settings["weak_clr"]
    write_result(cfg.results, "t", both)
    assert table((1,), ("a",))["settings"]["b"]["weak_clr"] == ""
    with pytest.raises(ValueError, match="t.json: c had other settings; choose another --results"):
        table((1,), clr=True)
    for change in ({"config": "config/real"}, {"data": "mine"}, {"lm_seeds": 3}):
        with pytest.raises(ValueError, match="t.json is of {'config': .*}, not {.*choose another"):
            lab.cfg = dataclasses.replace(cfg, cells=("a",), **change)
            ablation.make_table(lab, "t", {"a": Cell()}, measure=None)
    lab.tuned["rates"][WEAK] = 0.5
    with pytest.raises(ValueError, match="t.json has other steps or learning rates"):
        table((1,))


def test_an_interrupted_cell_resumes_to_the_same_numbers(cfg, tmp_path, monkeypatch):
    whole = Lab(dataclasses.replace(cfg, work=str(tmp_path / "whole"))).train(0, SUP, EVERYTHING)
    lab, real, steps = Lab(cfg), train.step_loss, []
    lab.train(0, WEAK, EVERYTHING)

    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "step_loss", interrupted)
    with pytest.raises(SystemExit) as stopped:
        lab.train(0, SUP, EVERYTHING)
    assert stopped.value.code == 128 + signal.SIGTERM and len(steps) == 2
    folder = lab.train(0, SUP, EVERYTHING)
    assert len(steps) == 12                            # none was taken twice
    assert read_scores(folder) == read_scores(whole)


def test_rates_are_the_best_by_the_mean_of_two_cells(cfg, monkeypatch):
    lab, asked = Lab(cfg), []
    scores = {0.5: (1, 9), 1.0: (4, 4), 2.0: (9, 0)}   # NOTHING, EVERYTHING: 0.5 wins by its sum

    def score(stage, cell):
        asked.append((stage, cell.lora_rank))
        factor = lab.rate(stage, cell) / lab.base[stage].learning_rate
        if cell.lora_rank:
            return {3: 3, 10: 2, 30: 7}[round(20 * factor)]    # 0.3, 1 and 3 times the chosen 0.5
        return scores[factor][cell.schedule == "linear"]

    monkeypatch.setattr(lab, "score_on_dev", score)
    lab.tune(with_lora=True)
    assert lab.tuned["rates"] == {WEAK: 0.5e-3, SUP: 0.5e-3, "lora": 3.0}
    assert len(asked) == 6 + 6 + 3 and lab.tuned["tried"]["lora"]["3.0"] == [7]
    cell = dataclasses.replace(EVERYTHING, lora_rank=16)
    assert lab.settings(0, SUP, cell).learning_rate == pytest.approx(1.5e-3)
    again = Lab(cfg)                                   # rates are kept in WORK/rates.json
    monkeypatch.setattr(again, "score_on_dev", None)
    again.tune(with_lora=True)
    assert again.tuned == lab.tuned


def test_tuned_rates_count_only_where_they_are_asked_for(cfg, monkeypatch):
    seen = []
    monkeypatch.setitem(ablation.COMMANDS, "tune", lambda lab: seen.append(lab.rate(WEAK, Cell())))
    own = Lab(cfg).base[WEAK].learning_rate
    (Path(cfg.work) / "rates.json").write_text(f'{{"rates": {{"{WEAK}": 0.5}}, "tried": {{}}}}')
    assert Lab(cfg).rate(WEAK, Cell()) == 0.5
    ablation.main(["tune", f"--config={cfg.config}", f"--data={cfg.data}", f"--work={cfg.work}",
                   "--weak_steps=0", "--sup_steps=0", "--tune=false"])
    assert seen == [own]


def test_rates_are_chosen_on_dev_and_rates_of_stage_4_share_stage_3(cfg):
    lab = Lab(cfg)
    pair = [lab.settings(TUNING_SEED, SUP, Cell(weak_rate=0.1, sup_rate=rate)) for rate in (1, 2)]
    assert pair[0].previous == pair[1].previous and pair[0].out != pair[1].out
    assert [name.split("/")[-1] for name in pair[0].evaluate] == ["dev", "clr_dev"]
    assert lab.settings(0, SUP, Cell()).evaluate[1].endswith("clr_test")
    assert 0 < lab.score_on_dev(WEAK, NOTHING) < 100


def test_clr_written_anew_keeps_everything_but_meaning_or_language(tmp_path):
    pairs = [("sort the list", "a"), ("read the file", "b")] * 20
    names = [str(tmp_path / name) for name in ("clr.jsonl", "docs.jsonl", "more.jsonl")]
    rows = [{"query": "x", "pos": [p], "lang": "de", "source_id": i} for i, (_, p) in
            enumerate(pairs)]
    write_jsonl(names[0], rows)
    write_jsonl(names[1], ({"input": q, "output": p} for q, p in pairs))
    write_jsonl(names[2], [{"query": "another of the same passage", "pos": ["a"]}])
    path = write_clr(tmp_path / "wrong.jsonl", names[0], names[1:], "wrong")
    wrong = list(read_jsonl(path))
    assert [{**row, "query": "x"} for row in wrong] == rows
    text = " ".join(row["query"] for row in wrong)
    assert "Liste" not in text and "sortier" not in text and len(text) > 200
    before = path.stat().st_mtime_ns
    assert write_clr(path, names[0], names[1:], "wrong") == path
    assert path.stat().st_mtime_ns == before
    two = list(read_jsonl(write_clr(tmp_path / "two.jsonl", names[0], names[1:], "two")))
    assert [row["lang"] for row in two[:3]] == ["de", "zh", "de"]
    assert [row["pos"] for row in two] == [row["pos"] for row in rows]
    text = " ".join(row["query"].lower() for row in two)
    assert "liste" in text and "sortier" in text and "another" not in text
    with pytest.raises(ValueError, match="clr.jsonl: 20 rows translate no question of .*more"):
        write_clr(tmp_path / "new.jsonl", names[0], names[2:], "wrong")


def test_clr_in_stage_3_is_one_more_file_of_pairs(cfg, monkeypatch):
    monkeypatch.setattr(cells, "write_clr", lambda path, clr, pairs, how: f"{how}:{clr}")
    lab = Lab(cfg)
    for how, last in (("all", f"{cfg.data}/clr.jsonl"), ("two", f"two:{cfg.data}/clr.jsonl")):
        stages = [lab.settings(0, stage, Cell(weak_clr=how)) for stage in (SFT, WEAK, SUP)]
        assert stages[1].pairs == (*stages[0].pairs, last)
        assert stages[0].pairs == stages[2].pairs == lab.settings(0, WEAK, Cell()).pairs
        assert stages[1].out.endswith(f"linear-weak_clr={how}")
        assert "clr" not in stages[2].task_weights
    few, rows = lab.base[SUP].clr[0], list(read_jsonl(f"{cfg.data}/clr.jsonl"))
    write_jsonl(few, rows[:3])
    again = list(read_jsonl(lab.settings(0, WEAK, Cell(weak_clr="few")).pairs[-1]))
    assert again[:4] == [*rows[:3], rows[0]] and len(again) == len(rows)


@pytest.mark.slow
def test_the_claims_are_read_from_the_same_cells(cfg, monkeypatch):
    cfg = dataclasses.replace(cfg, seeds=(0,))
    hard, soft, causal = (row["0"] for row in command(cfg, "sec32")["cells"].values())
    assert [row["Rank of M, start"] for row in (hard, soft, causal)] == [1, 32, 32]
    assert soft["Rank of M, end"] == 1 < soft["Rank of M, half"] < 32
    assert hard["LM loss before"] == soft["LM loss before"]
    rows = command(cfg, "clr")["cells"]
    assert list(rows) == ["without CLR", "CLR", "CLR by a wrong dictionary", "CLR in stage 3",
                          "CLR in stages 3 and 4", "CLR in stage 3 by a wrong dictionary",
                          "CLR in stage 3 with few questions", "CLR in stage 3 in two languages"]
    assert list(rows["CLR"]["0"])[3:] == [
        "whole", "untranslated words", "translated words", "these in English",
        "whole, de and zh", "translated words, de and zh"]
    assert rows["CLR in stage 3"]["0"]["Multi"] != rows["without CLR"]["0"]["Multi"]
    assert rows["CLR"]["0"]["Multi"] != rows["CLR by a wrong dictionary"]["0"]["Multi"]
    monkeypatch.setattr(ablation, "PARTS", 2)
    fixed, _, _, last = (row["0"] for row in command(cfg, "sec34")["cells"].values())
    assert fixed["Replaced in a step"] == 0 and "CLR: Replaced in a step" not in fixed
    assert "S, part 2" in last and "CLR: S, part 2" in last


@pytest.mark.slow
def test_the_curve_has_a_point_for_each_amount_of_text(cfg, monkeypatch):
    cfg = dataclasses.replace(cfg, seeds=(0,), lm_tokens=(0, 320))     # 160 tokens a step
    monkeypatch.setattr(ablation, "EQUAL_TIME", 320)
    table = command(cfg, "curve")
    assert list(table["cells"]) == ["0M hard", "0M soft", "0.00032M hard", "0.00032M soft",
                                    "0.00064M hard", "0.00064M soft",
                                    "no LM but time of 0.00032M", "no LM but time of 0.00064M",
                                    "no LM but time of 0.00064M at half the rate",
                                    "no LM but time of 0.00064M at twice the rate"]
    assert list(table["differences"])[-4:] == ["0.00032M: LM minus its time",
                                               "0.00064M: LM minus its time",
                                               "0.00064M: LM minus its time at half the rate",
                                               "0.00064M: LM minus its time at twice the rate"]
    short, longest = (table["settings"][f"{n}M soft"] for n in ("0.00032", "0.00064"))
    assert short["lm_steps"] == 2 and longest["lm_steps"] is None
    assert short["weak_rate"] == Lab(cfg).base[WEAK].learning_rate / 2 and not longest["weak_rate"]
    assert table["settings"]["no LM but time of 0.00064M"]["weak_steps"] > 5
    assert table["points"] == {"0M": 0, "0.00032M": 320, "0.00064M": 640}
    monkeypatch.setattr(ablation, "steps_of_equal_time", None)         # not timed again
    table = command(dataclasses.replace(cfg, seeds=(1,)), "curve", "--cells=0M hard")
    assert list(table["cells"]["0M hard"]) == ["0", "1"]


def test_pairs_and_similarity_are_measured_where_a_file_is_named(home, cfg, tmp_path):
    rows = [{"sentence1": "a", "sentence2": b, "label": i % 2, "score": i, "lang": lang}
            for lang in ("en", "de") for i, b in enumerate(("sort", "a list", "read", "tree"))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab = Lab(dataclasses.replace(cfg, pawsx=str(path), sts=str(path)))
    folder = lab.train(0, WEAK, NOTHING)
    assert {"PAWS-X", "STS"} <= lab.measure(folder).keys()
    assert lab.measure(folder) == lab.measure(folder)


@pytest.mark.parametrize("argv, message", [
    ([], "one of the commands tune, table4, table6"), (["table5"], "not table5"),
    (["curve", "--lm_seeds=0"], "lm_seeds 0: at least one")])
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message):
        ablation.main(argv)
