"""The chain of stages, what may differ when a run resumes, and what a checkpoint says of itself."""
import dataclasses
import json
from pathlib import Path

import pytest

import train
from configurator import ConfigError
from engine import checkpoint
from engine import run as runs
from ranks import ROOT, tiny_config


@pytest.fixture
def files(tmp_path):
    """Config files of two stages: the first one has the shape."""
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    first = write("first.py", 'stage = "pretrain"\nn_layer = 3\nsteps = 7\nout = "x"\n')
    return write, write("last.py", f'stage = "embed_weak"\nprevious = {first!r}\nsteps = 9\n')


def of(configs, *names):
    return [tuple(getattr(cfg, name) for name in names) for cfg in configs]


# ---------------------------------------------------------------- the chain of stages

def test_a_shared_setting_of_the_first_stage_holds_for_the_later_ones(files):
    configs = runs.chain(train.TrainConfig, [files[1]])
    assert of(configs, "stage", "n_layer", "out", "steps") == [
        ("pretrain", 3, "x", 7), ("embed_weak", 3, "x", 9)]


def test_flags_reach_the_earlier_stages_where_they_are_shared(files):
    write, last = files
    size = write("size.py", "n_embd = 64\nlearning_rate = 0.5\n")
    argv = [last, size, "--seed=5", "--steps=2", "--lora_rank=4", "--schedule=hard"]
    configs = runs.chain(train.TrainConfig, argv)
    assert of(configs, "n_embd", "seed") == [(64, 5), (64, 5)]
    assert of(configs, "steps", "learning_rate") == [(7, 1e-3), (2, 0.5)]
    assert of(configs, "lora_rank", "schedule") == [(0, "linear"), (4, "hard")]
    sup = write("sup.py", f'stage = "embed_sup"\nprevious = {last!r}\n')
    configs = runs.chain(train.TrainConfig, [sup, "--lora_rank=4", "--schedule=hard"])
    assert of(configs, "lora_rank", "schedule") == [(0, "linear"), (4, "hard"), (4, "hard")]


def test_the_mask_and_adapters_of_a_stage_3_file_hold_for_stage_4_and_no_other(files):
    write, last = files
    weak = write("last.py", Path(last).read_text() + 'lora_rank = 4\n'
                            'schedule = "causal"\ntemperature = 0.1\n')
    sup = write("sup.py", f'stage = "embed_sup"\nprevious = {weak!r}\n')
    own = write("own.py", f'stage = "embed_sup"\nprevious = {weak!r}\nschedule = "hard"\n')
    for path, schedule in ((sup, "causal"), (own, "hard")):
        configs = runs.chain(train.TrainConfig, [path])
        assert of(configs[1:], "lora_rank", "schedule", "temperature") == [
            (4, "causal", 0.1), (4, schedule, 0.05)]
        assert of(configs[:1], "lora_rank", "schedule") == [(0, "linear")]


def test_shared_settings_reach_every_stage(files):
    write, last = files
    sup = write("sup.py", f'stage = "embed_sup"\nprevious = {last!r}\n')
    shared = {"skip_bad_lines": True, "evaluate": ("x",), "log_every": 3, "save_every": 4,
              "seed": 5, "device": "cpu", "pairs": ("p.jsonl",), "data": "y"}
    masks = {"mask_axis": "col", "mask_apply": "logits"}
    flags = [f"--{k}={v[0] if isinstance(v, tuple) else v}" for k, v in (shared | masks).items()]
    configs = runs.chain(train.TrainConfig, [sup, *flags])
    assert all({k: getattr(cfg, k) for k in shared} == shared for cfg in configs)
    assert of(configs, *masks) == [("row", "weights"), ("col", "logits"), ("col", "logits")]


def test_a_stage_without_one_before_it_is_alone(files):
    assert of(runs.chain(train.TrainConfig, [files[1], "--previous="]), "n_layer") == [(4,)]
    assert of(runs.chain(train.TrainConfig, ["--stage=embed_sup"]), "stage") == [("embed_sup",)]


@pytest.mark.parametrize("argv", [[], ["--steps=20"]])
def test_a_command_that_names_no_stage_is_refused(argv):
    with pytest.raises(ConfigError, match="name the config of a stage, such as config/embed_sup"):
        runs.chain(train.TrainConfig, argv)


def test_a_chain_that_leads_back_is_refused(files):
    write, last = files
    write("first.py", f'stage = "pretrain"\nprevious = {last!r}\n')
    with pytest.raises(ConfigError, match="last.py: previous leads back to it"):
        runs.chain(train.TrainConfig, [last])


def test_a_stage_that_comes_twice_is_refused(files):
    with pytest.raises(ConfigError, match="pretrain, pretrain: one comes twice"):
        runs.chain(train.TrainConfig, [files[1], "--stage=pretrain"])


def test_a_later_stage_of_another_shape_is_refused(files):
    write, last = files
    sup = write("sup.py", f'stage = "embed_sup"\nprevious = {last!r}\nn_layer = 4\n')
    with pytest.raises(ConfigError, match="model has n_layer 3, embed_sup asks for 4"):
        runs.chain(train.TrainConfig, [sup])


def test_a_refused_setting_is_said_of_its_stage(files):
    with pytest.raises(ConfigError, match="^pretrain: TrainConfig: .* must not exceed block_size"):
        runs.chain(train.TrainConfig, [files[1], "--block_size=8"])


@pytest.mark.parametrize("family", ["", "small/", "real/", "full/"])
def test_each_family_of_configs_writes_its_shape_once(family):
    configs = runs.chain(train.TrainConfig, [f"config/{family}embed_sup.py"])
    assert tuple(cfg.stage for cfg in configs) == train.STAGES
    assert len({cfg.model_config() for cfg in configs}) == 1
    assert len({(cfg.out, cfg.data, cfg.seed) for cfg in configs}) == 1
    for name in ("sft", "embed_weak", "embed_sup"):
        text = (ROOT / f"config/{family}{name}.py").read_text()
        assert not [key for key in runs.MODEL if f"\n{key} =" in text]


def test_the_later_word_wins_for_earlier_stages_too(tmp_path):
    (tmp_path / "x.py").write_text("seed = 2\n")
    for argv, seed in (([str(tmp_path / "x.py"), "--seed=1"], 1),
                       (["--seed=1", str(tmp_path / "x.py")], 2)):
        configs = runs.chain(train.TrainConfig, ["config/embed_sup.py", *argv])
        assert [cfg.seed for cfg in configs] == [seed] * 4


def test_settings_are_classified_by_names_that_exist():
    names = {field.name for field in dataclasses.fields(train.TrainConfig)}
    for group in (runs.MODEL, runs.DATA, runs.PATHS, runs.MACHINE, runs.SHARED_BY_STAGES,
                  runs.SHARED_BY_EMBEDDING, runs.MAY_CHANGE_ON_RESUME):
        assert group <= names, group - names
    shape = {field.name for field in dataclasses.fields(train.ConanConfig)}
    assert runs.MODEL == shape & names
    assert {"dtype", "seed", "steps"}.isdisjoint(runs.MAY_CHANGE_ON_RESUME)


# ---------------------------------------------------------------- resuming

def saved(folder, step, cfg, data=None, scored=True):
    """Write a checkpoint of a stage as `meta_of` describes it; return its path."""
    meta = {"train": dataclasses.asdict(cfg), "step": step, "data": data or {}}
    path = checkpoint.save(folder, step, {"config.json": json.dumps(meta)})
    if scored:
        (folder / "eval.json").write_text("{}")
    return path


def test_a_stage_is_finished_when_it_took_all_steps_and_was_scored(tmp_path):
    cfg = tiny_config(out=str(tmp_path), steps=5)
    assert runs.finished(cfg) is None
    for step, scored, done in ((3, True, False), (5, False, False), (5, True, True)):
        (cfg.run_dir / "eval.json").unlink(missing_ok=True)
        path = saved(cfg.run_dir, step, cfg, scored=scored)
        assert runs.finished(cfg) == (path if done else None)


def test_settings_of_the_machine_may_change_and_others_may_not(tmp_path):
    cfg = tiny_config(out=str(tmp_path))
    path = saved(cfg.run_dir, 4, cfg)
    other = dataclasses.replace(cfg, checkpointing=9, parallel="zero1", save_every=7,
                                micro_batch_size=3, evaluate=("x",), retrieval=("moved.jsonl",))
    assert runs.finished(other) == path
    with pytest.raises(ValueError) as caught:
        runs.finished(dataclasses.replace(cfg, seed=9, dims=(4,)))
    assert str(caught.value).startswith(f"{path} was trained with ")
    assert "seed=0 there, 9 now" in str(caught.value) and "dims=[] there, [4]" in str(caught.value)


def test_what_decides_a_result_may_not_change_on_resume():
    names = {field.name for field in dataclasses.fields(train.TrainConfig)}
    assert names - runs.MAY_CHANGE_ON_RESUME == runs.MODEL | runs.SHARED_BY_EMBEDDING | {
        "stage", "seed", "skip_bad_lines", "query_len", "passage_len", "temperature", "dims",
        "task_weights", "dhnm", "n_negatives", "pool_size", "steps", "batch_size", "batch_sizes",
        "learning_rate", "warmup", "final_lr", "weight_decay", "beta2", "dtype"}


def test_a_pool_may_be_no_larger_than_what_is_in_use():
    assert tiny_config(n_negatives=4, pool_size=4).pool_size == 4


def test_a_setting_younger_than_a_checkpoint_has_its_default(tmp_path):
    cfg = tiny_config(out=str(tmp_path))
    meta = {"train": {k: v for k, v in dataclasses.asdict(cfg).items() if k != "pool_prompt"},
            "step": 1, "data": {}}
    path = checkpoint.save(cfg.run_dir, 1, {"config.json": json.dumps(meta)})
    runs.check_settings(cfg, runs.read_meta(path)["train"], path)
    with pytest.raises(ValueError, match="pool_prompt=False there, True now"):
        runs.check_settings(dataclasses.replace(cfg, pool_prompt=True),
                            runs.read_meta(path)["train"], path)


@pytest.mark.parametrize("now, reason", [
    ({"pairs": {"b/a.jsonl": "1", "b.jsonl": "2"}}, None),                # it lies elsewhere
    ({"pairs": {"a.jsonl": "9", "b.jsonl": "2"}}, "other pairs data: a.jsonl changed. Bring"),
    ({"pairs": {"a.jsonl": "1", "b.jsonl": "2", "c.jsonl": "3"}}, "data: c.jsonl new. Bring"),
    ({"pairs": {"a.jsonl": "1"}}, "data: b.jsonl gone. Bring"),
    ({"pairs": {"b.jsonl": "2", "a.jsonl": "1"}}, "data: the order of its files changed. Bring"),
    ({}, "pairs data: a.jsonl, b.jsonl gone; where files are named, the folder --data is not"),
    ({"pairs": {"a.jsonl": "1", "b.jsonl": "2"}, "sts": {"s.jsonl": "4"}},
     "other sts data: s.jsonl new. Bring"),
])
def test_data_is_compared_by_content(tmp_path, now, reason):
    cfg = tiny_config(out=str(tmp_path))
    path = saved(cfg.run_dir, 1, cfg, {"pairs": {"a.jsonl": "1", "b.jsonl": "2"}})
    if reason is None:
        return runs.check_data(now, path)
    with pytest.raises(ValueError) as caught:
        runs.check_data(now, path)
    assert str(caught.value).startswith(f"{path} was trained on ")
    assert reason in str(caught.value) and "--resume=false" in str(caught.value)


def test_a_machine_without_git_can_save(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.versions.__wrapped__()["git"] is None      # past the cache


def test_scores_are_set_aside_before_their_weights(tmp_path, monkeypatch):
    """A run killed in between must not find the old scores beside no weights, or new ones."""
    cfg = tiny_config(out=str(tmp_path))
    saved(cfg.run_dir, 4, cfg)

    def killed(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "set_aside", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.set_aside(cfg)
    assert (cfg.run_dir / "eval.json.aside").is_file() and runs.finished(cfg) is None


@pytest.mark.parametrize("step, kept", [(None, "old"), (0, "old"), (3, "new")])
def test_the_log_of_a_run_that_took_no_step_is_not_set_aside(tmp_path, step, kept):
    cfg = tiny_config(out=str(tmp_path))
    if step is not None:
        saved(cfg.run_dir, step, cfg)
    (cfg.run_dir / "step_000006.aside").mkdir(parents=True)        # of the older one
    (cfg.run_dir / "log.jsonl").write_text("new")
    (cfg.run_dir / "log.jsonl.aside").write_text("old")
    runs.set_aside(cfg)
    assert (cfg.run_dir / "log.jsonl.aside").read_text() == kept
