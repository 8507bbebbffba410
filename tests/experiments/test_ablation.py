"""The trained tables: statistics, the grid, what cells share, and a tiny run of a table."""
import dataclasses
import json
import math
import os
import random
import signal
from pathlib import Path

import pytest

import train
from toy.corpus import write_jsonl
from experiments import ablation, claims, tables
from experiments.ablation import LONGER, TABLE_4, TABLE_6, TABLE_12
from experiments.lab import FULL, NONE, PRETRAIN, SFT, SUP, WEAK, Lab, columns, is_done, \
    real_data, seconds, write_collection
from experiments.stats import interval, paired, shown, t_quantile
from experiments.tables import TablesConfig

SHAPE = {"vocab_size": 400, "n_layer": 1, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "ffn_dim": 16,
         "attention_dim": 0, "norm_eps": 1e-5, "embed_std": 0.02, "embed_rank_power": 0.0,
         "log_every": 1, "query_len": 16, "passage_len": 24, "keep_last": 1, "device": "cpu"}
TINY = {"all": SHAPE, PRETRAIN: {"steps": 2, "batch_size": 4, "passage_len": 16},
        SFT: {"steps": 1, "batch_size": 4}, WEAK: {"steps": 4, "batch_size": 8},
        SUP: {"steps": 12, "batch_size": 4, "n_negatives": 2, "pool_size": 5,
              "task_weights": {"retrieval": 2.0, "clr": 1.0}}}
WORDS = "sort list tree graph node edge file read write matrix vector random time".split()


# ---------------------------------------------------------------- statistics

def test_interval_by_hand():
    """1, 2, 3: s = 1, t of two degrees of freedom 4.3027, half = 4.3027 / sqrt(3)."""
    mean, half = interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert interval([5, 5, 5]) == (5, 0)
    mean, half = interval([7])
    assert mean == 7 and math.isnan(half)


@pytest.mark.extras
def test_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 1.7, 0.9, 1.1, 2.4, -0.5]
    for df in (1, 2, 4, 9, 60):
        for level in (0.5, 0.95, 0.99):
            assert t_quantile(df, level) == pytest.approx(
                stats.t.ppf((1 + level) / 2, df), rel=1e-5)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 6,
                                 scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-6)


def test_differences_are_paired_by_seed():
    """Seeds that differ by 10 from each other, cells by 1: the spread of the seeds cancels."""
    ours, base = {0: 11.0, 1: 21.0, 2: 31.5, 7: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0, 9: 0.0}
    mean, half = paired(ours, base)
    assert mean == pytest.approx(3.5 / 3)              # 1, 1, 1.5; seeds 7 and 9 are alone
    assert half == pytest.approx(4.302653 * math.sqrt(1 / 12) / math.sqrt(3), abs=1e-5)
    assert half < interval([11, 21, 31.5])[1] / 10


def test_a_difference_is_bold_if_it_exceeds_its_interval():
    assert shown((1.26, 0.5), True) == "**+1.3 ± 0.5**"
    assert shown((-0.4, 0.5), True) == "-0.4 ± 0.5"
    assert shown((1.26, 0.5)) == "1.3 ± 0.5"
    assert shown((1.26, math.nan)) == "1.3"


def test_columns_are_means_over_languages_and_collections():
    scores = {f"retrieval/{name}/{pair}/ndcg@10": value for name, pair, value in (
        ("a", "en-en", 0.5), ("b", "en-en", 0.7), ("a", "zh-en", 0.1), ("a", "de-en", 0.3),
        ("b", "de-en", 0.2), ("a", "de-zh", 0.9), ("a", "all", 0.9), ("a", "mean", 0.9))}
    scores |= {"retrieval/a/de-en/recall@1": 1.0, "retrieval/a/de-en/ndcg@10:64": 1.0,
               "dhnm/clr/queries_changed_1_times": 3}
    assert columns(scores) == pytest.approx({"Multi": 20, "Eng": 60, "Zh": 10})
    with pytest.raises(ValueError, match="zh are needed"):
        columns({"retrieval/a/en-en/ndcg@10": 0.5})


def test_the_effect_of_a_part_is_the_mean_over_the_others():
    """Score = 1 SM + 10 CLR + 100 DHNM + 5 (SM and CLR) + seed: SM makes 1 + 5 / 2."""
    cells = {ablation.name_4(key): {"scores": {seed: {"Eng": (
        key[0] + 10 * key[1] + 100 * key[2] + 5 * (key[0] and key[1]) + seed)} for seed in (0, 3)}}
        for key in TABLE_4}
    for at, value in enumerate((3.5, 12.5, 100)):
        assert ablation.effect(cells, at, "Eng") == pytest.approx((value, 0))


def test_standing_still_is_the_longest_way_without_a_new_minimum():
    log = [{"loss": loss, "grad_norm": 1.0} for loss in (4, 3, 2, 2, 2, 2, 1, 0.5, 0.4, 0.3)]
    found = claims.after_switch(log, chance=4.0)
    assert found["longest_stand"] == 4                 # from step 3 to step 7
    assert found["step_at_90%_of_chance"] == 2 and found["step_at_60%_of_chance"] == 3
    assert claims.after_switch(log[:2], 4.0)["step_at_60%_of_chance"] == 2     # never: the end
    assert (found["loss_first_tenth"], found["loss_last_tenth"]) == (4, 0.3)
    assert claims.smooth([1, 2, 3, 7], 2) == [1, 1.5, 2.5, 5]


def test_seconds_of_a_step_come_from_its_tokens():
    log = [{"tokens": 100, "tokens_per_second": 50}, {"tokens": 160, "tokens_per_second": 30}]
    assert seconds(log) == [2, 2]


def test_hardness_goes_by_task_and_part():
    log = [{"task": "retrieval", "S": s, "S_0": 0.5, "replaced": 1, "exhausted": 0, "loss": 1}
           for s in (0.1, 0.2, 0.3, 0.4)] + [{"task": "sts", "loss": 1}]
    found = claims.hardness(log, parts=2)
    assert list(found) == ["retrieval"]
    assert [part["S"] for part in found["retrieval"]] == pytest.approx([0.15, 0.35])


# ---------------------------------------------------------------- the grid, and a tiny run

@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """A corpus in the embedded one's form, of words that the lexicon has."""
    folder, rng = tmp_path_factory.mktemp("docs"), random.Random(0)
    rows = [(f"{a} the {b} {c}", f"This function can {a} a {b} by its {c}, number {i}.")
            for i in range(80) for a, b, c in [rng.sample(WORDS, 3)]]
    (folder / "pairs").mkdir()
    write_jsonl(folder / "text.jsonl", ({"text": f"{q}. {p}"} for q, p in rows))
    write_jsonl(folder / "pairs" / "documentation.jsonl",
                ({"input": q, "output": p} for q, p in rows[:40]))
    write_jsonl(folder / "retrieval.jsonl", ({"query": q, "pos": [p]} for q, p in rows[:40]))
    write_jsonl(folder / "clr.jsonl", ({"query": q, "pos": [p]} for q, p in rows[:40]))
    for split, part in (("dev", rows[40:60]), ("test", rows[60:])):
        write_collection(
            folder / split, [{"id": f"f/{i}", "text": p} for i, (_, p) in enumerate(part)],
            [{"id": f"f/{i}", "text": q} for i, (q, _) in enumerate(part)],
            {f"f/{i}": {f"f/{i}": 1} for i in range(20)})
    return folder


@pytest.fixture
def cfg(docs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.lab.TOY", TINY)
    monkeypatch.setattr("experiments.lab.ensure_docs", lambda cfg: None)
    monkeypatch.setattr("experiments.lab.RATES", {"toy": {WEAK: (1e-3,), SUP: (1e-4, 1e-3),
                                                    "lora": (2.0,)}, "real": {}})
    return TablesConfig(docs=str(docs), seeds=(0, 1), work=str(tmp_path / "work"),
                        results=str(tmp_path / "results"))


def differing(a, b):
    a, b = dataclasses.asdict(a), dataclasses.asdict(b)
    return {key for key in a if a[key] != b[key]} - {"out", "previous"}


def test_cells_differ_in_the_named_settings_and_in_no_other(cfg):
    lab = Lab(cfg)
    sup = {key: lab.config(0, SUP, one) for key, one in TABLE_4.items()}
    weak = {key: lab.config(0, WEAK, one) for key, one in TABLE_4.items()}
    for key, other in ((k, o) for k in TABLE_4 for o in TABLE_4):
        changed = {part for part, a, b in zip(("SM", "CLR", "DHNM"), key, other) if a != b}
        named = {"CLR": {"task_weights"}, "DHNM": {"dhnm"}, "SM": set()}
        assert differing(sup[key], sup[other]) == set().union(*(named[p] for p in changed))
        assert differing(weak[key], weak[other]) == ({"schedule"} if "SM" in changed else set())
    assert sup[False, False, False].task_weights == {"retrieval": 2.0}
    assert sup[True, True, True].task_weights == {"retrieval": 2.0, "clr": 1.0}
    assert sup[0, 0, 0].steps == sup[1, 1, 1].steps == TINY[SUP]["steps"]
    base = lab.config(0, WEAK, TABLE_12["Linear"])
    assert [differing(base, lab.config(0, WEAK, one)) - {"save_every", "keep_last"}
            for one in list(TABLE_12.values())[1:]] == [
        {"schedule"}, {"schedule"}, {"schedule"}, {"mask_axis"}, {"mask_apply"}]
    assert all(not one.clr and one.dhnm == "fixed" for one in TABLE_12.values())
    for short, long in zip((TABLE_12["Linear"], NONE), LONGER.values()):   # the schedule stretches
        assert differing(lab.config(0, WEAK, short), lab.config(0, WEAK, long)) \
            - {"save_every", "keep_last"} == {"steps"}
        assert not differing(lab.config(0, SUP, short), lab.config(0, SUP, long))


def test_lora_differs_in_rank_and_its_own_rate(cfg):
    lab = Lab(cfg)
    lab.rates = {WEAK: 1e-3, SUP: 1e-4, "lora": 2.0}
    for stage in (WEAK, SUP):
        full, low = (lab.config(0, stage, TABLE_6[rank, True]) for rank in (0, 16))
        assert differing(full, low) - {"save_every", "keep_last"} == {"lora_rank", "learning_rate"}
        assert (low.lora_rank, low.learning_rate) == (16, 2 * full.learning_rate)


def test_tables_share_their_stages(cfg):
    """Of 18 cells four are in two tables; 12 masks make 12 weak stages, one LM all of them."""
    lab = Lab(cfg)
    cells = [*TABLE_4.values(), *TABLE_6.values(), *TABLE_12.values()]
    plan = [stage.stage for stage in lab.stages(0, cells)]
    assert [plan.count(stage) for stage in train.STAGES] == [1, 1, 12, 18]
    assert TABLE_12["Linear"] == TABLE_4[True, False, False]
    assert TABLE_12["hard switch"] == NONE and TABLE_6[0, True] == FULL


def test_questions_are_put_into_25_languages_and_never_trained_on(cfg, docs):
    lab = Lab(cfg)
    rows = [json.loads(line) for line in open(lab.work / "test" / "queries.jsonl")]
    assert len(rows) == 20 + 20 * 25 and len({row["lang"] for row in rows}) == 26
    asked = {row["text"] for row in rows} | {
        json.loads(line)["text"] for line in open(lab.work / "test" / "corpus.jsonl")}
    for name in ("retrieval", "clr"):
        trained = [json.loads(line) for line in open(lab.work / f"{name}.jsonl")]
        assert not asked & {text for row in trained for text in row["pos"]}
    assert len({row["lang"] for row in trained}) > 10 and "en" not in {r["lang"] for r in trained}


@pytest.fixture
def two(monkeypatch):
    """A table of two cells; the others are read from these two."""
    cells = {ablation.name_4(key): NONE if sum(key) < 3 else FULL for key in TABLE_4}
    monkeypatch.setattr(ablation, "table4", lambda cfg: ablation.make_table(
        cfg, "table4", cells, ablation.table4_lines))


def flags(cfg):
    return [f"--{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in
            dataclasses.asdict(cfg).items() if key in ("docs", "seeds", "work", "results")]


def test_a_tiny_table_from_the_command_line(cfg, two, tmp_path, capsys):
    tables.main(["table4", *flags(cfg)])
    found = json.loads((tmp_path / "results" / "table4.json").read_text())
    assert found["seeds"] == [0, 1] and found["scale"] == "toy"
    assert found["settings"][SUP]["n_negatives"] == 2
    tried = found["learning_rates_tried"]
    assert tried[SUP].keys() == {"nothing on", "all on"}
    assert tried[SUP]["all on"].keys() == {"0.0001", "0.001"}
    home = tmp_path / "work" / "toy"
    scores = json.loads((home / "seed1" / "linear-clr-dhnm-sup" / SUP / "eval.json").read_text())
    assert found["cells"]["SM+CLR+DHNM"]["scores"]["1"] == columns(scores)
    assert found["cells"]["nothing"]["after_stage_3"]["0"].keys() == {"Multi", "Eng", "Zh"}
    before = {train.load_config(train.TrainConfig, [str(home / "seed0" / name / f"{WEAK}.py")])
              .previous for name in ("hard", "linear")}
    assert before == {str(home / "seed0" / "lm" / f"{SFT}.py")}        # one checkpoint for both
    text = (tmp_path / "results" / "table4.md").read_text()
    assert "| SM | CLR | DHNM | Multi | Eng | Zh | paper Multi | paper Eng | paper Zh |" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines()
            if line.startswith("| ✓ | ✓ | ✓ |")]
    assert [cell.strip() for cell in rows[0][6:]] == ["65.17", "73.52", "74.24"]
    assert len(rows) == 2 and "±" in rows[1][3] and ("+" in rows[1][3] or "-" in rows[1][3])
    assert "| ✗ | ✓ | ✓ |" in text and "seeds 0, 1" in text
    assert f"| {SUP} | all on | " in text and "0.0001: " in text and "0.001: " in text

    def times():
        return {p: p.stat().st_mtime_ns for p in home.glob("seed*/*/*/log.jsonl")}
    before = times()
    tables.main(["table4", *flags(cfg)])               # nothing is trained twice
    assert times() == before


def test_an_interrupted_cell_goes_on_to_the_same_numbers(cfg, tmp_path, monkeypatch):
    """A signal during stage 4: its state is saved, the command ends, and the next one goes on."""
    lab = Lab(cfg)
    for stage in lab.stages(0, [FULL])[:-1]:
        lab.run(stage)
    last = lab.stages(0, [FULL])[-1]
    lab.run(dataclasses.replace(last, out=str(tmp_path / "whole")))
    real, steps = train.stage_loss, []

    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "stage_loss", interrupted)
    with pytest.raises(SystemExit) as stopped:
        lab.run(last)
    assert stopped.value.code == 128 + signal.SIGTERM and len(steps) == 2
    assert not is_done(last)
    lab.run(last)
    assert len(steps) == 12 and is_done(last)      # none was taken twice
    ours, whole = (json.loads((folder / SUP / "eval.json").read_text())
                   for folder in (Path(last.out), tmp_path / "whole"))
    assert ours == whole


def test_the_attention_has_the_rank_that_was_built_into_it(cfg):
    """Attention that ignores its logits is M with rows of sum 1: of full rank, and of rank 1."""
    import torch

    from embed import Embedder
    from mask import MaskSpec, effective_rank, soft_mask
    lab = Lab(cfg)
    for stage in lab.stages(0, [])[:2]:
        lab.run(stage)
    embedder = Embedder(lab.config(0, SFT).run_dir, dtype="float32")
    for block in embedder.model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    texts = ["sort the list of a graph by its random vector, the file and the tree of time"] * 2
    for alpha in (0.0, 0.3, 1.0):
        embedder.mask = MaskSpec(alpha)
        rank, smooth, realised = claims.attention_ranks(embedder, texts, n=8)
        m = soft_mask(8, alpha)
        assert realised == pytest.approx(effective_rank(m / m.sum(1, keepdim=True)), rel=1e-5)
        assert (rank, smooth) == (8 - math.floor(alpha * 8) if alpha < 1 else 1,
                                  pytest.approx(effective_rank(m)))


def test_the_claims_are_written_from_the_same_cells(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "TEXT_TOKENS", 8)
    ranks = claims.attention_ranks
    monkeypatch.setattr(claims, "attention_ranks",
                        lambda embedder, texts: ranks(embedder, ["sort the list " * 9], 8))
    tables.main(["sec32", *flags(cfg)])
    tables.main(["sec34", *flags(cfg)])
    found = json.loads((tmp_path / "results" / "sec32.json").read_text())
    steps = [row["step"] for row in found["soft"]["ranks"]["0"]]
    assert steps == [0, 1, 2, 3, 4]
    assert [row["alpha"] for row in found["hard"]["ranks"]["0"]] == [1.0] * 5
    assert found["soft"]["ranks"]["0"][0]["rank_of_M"] == 8
    assert "| longest stand |" in (tmp_path / "results" / "sec32.md").read_text()
    found = json.loads((tmp_path / "results" / "sec34.json").read_text())
    assert found["cells"]["SM fixed"]["changes"]["0"] == {"replaced_each": 0, "untouched": 1}
    assert found["cells"]["SM+CLR dynamic"]["hardness"]["1"].keys() == {"clr", "retrieval"}
    assert "queries without a pool left" in (tmp_path / "results" / "sec34.md").read_text()


def test_real_scale_deals_the_questions_of_a_folder_of_sets(cfg, tmp_path):
    with pytest.raises(ValueError, match="--root=FOLDER"):
        real_data("", tmp_path)
    with pytest.raises(ValueError, match="scale 'huge' is unknown"):
        Lab(dataclasses.replace(cfg, scale="huge"))
    root = tmp_path / "sets"
    rows = [{"id": f"q{i}", "lang": "zh" if i % 2 else "en", "text": f"q {i}"} for i in range(40)]
    write_collection(root / "qa_dev", [{"id": "d", "lang": "en", "text": "passage"}],
                              rows, {row["id"]: {"d": 1} for row in rows})
    write_jsonl(root / "bi.jsonl", [])
    (root / "bi").mkdir()
    (root / "bi.jsonl").rename(root / "bi" / "rows.jsonl")
    write_jsonl(root / "bi" / "rows.jsonl", [
        {"query": f"eins {i}", "pos": f"one {i}", "lang_q": "de", "lang_p": "en"}
        for i in range(20)])
    made = real_data(str(root), tmp_path / "real")
    assert made["text"] and made["pairs"] and not made["retrieval"]
    dealt = {split: {json.loads(line)["id"] for line in
                     open(tmp_path / "real" / split / "qa_dev" / "queries.jsonl")}
             for split in ("dev", "test")}
    assert not dealt["dev"] & dealt["test"] and len(dealt["dev"] | dealt["test"]) == 40
    assert min(map(len, dealt.values())) > 5
