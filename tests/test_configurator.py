"""The configurator: every way in which settings from files and flags are known to go wrong."""

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

import configurator
from configurator import ConfigError, help_text, load_config
from train import TrainConfig


@dataclass(frozen=True)
class Config:
    max_steps: int = 100  # optimizer steps
    learning_rate: float = 1e-3  # peak, "#1" knob
    warmup: Optional[int] = None  # steps; None: a tenth of max_steps
    compile: bool = False
    name: str = "#toy"  # run folder under out/
    # a comment of its own line is no help text
    out: str | None = None
    dims: tuple[int, ...] = (64, 128)  # MRL prefixes
    betas: tuple[float, float] = (0.9, 0.95)
    stages: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: {"sts": 1.0})
    kind: Literal["linear", "accelerating"] = "linear"  # of alpha
    bits: Literal[8, 16] = 8

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be positive, got {self.max_steps}")
        warmup = self.max_steps // 10 if self.warmup is None else self.warmup
        object.__setattr__(self, "derived", warmup)


@pytest.fixture
def write(tmp_path):
    def write(text, name="x.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("flag, value", [
    ("--learning_rate=1", 1.0),  # an int widens
    ("--learning_rate=3e-4", 3e-4),
    ("--max_steps=1_000", 1000),
    ("--compile", True), ("--compile=True", True), ("--compile=false", False),
    ("--compile=0", False),
    ("--name=a=b", "a=b"), ("--name=", ""), ("--name=None", "None"), ("--name=12", "12"),
    ("--out=none", None), ("--out=out/x", "out/x"),
    ("--warmup=None", None), ("--warmup=7", 7),
    ("--dims=64,128", (64, 128)), ("--dims=(64, 128)", (64, 128)), ("--dims=[64]", (64,)),
    ("--dims=64,", (64,)), ("--dims=()", ()), ("--dims=", ()),
    ("--betas=0.9,1", (0.9, 1.0)),
    ("--stages=sft,embed_sup", ("sft", "embed_sup")),
    ("--stages=('sft', 'x')", ("sft", "x")),
    ("--stages=(a),(b)", ("(a)", "(b)")), ("--stages=[a (1), (b)]", ("a (1)", "(b)")),
    ("--scales=1,0.5", (1.0, 0.5)),
    ("--weights=retrieval:3,sts:1", {"retrieval": 3.0, "sts": 1.0}), ("--weights=", {}),
    ("--kind=accelerating", "accelerating"), ("--bits=16", 16),
])
def test_flag(flag, value):
    got = getattr(load_config(Config, [flag]), flag[2:].partition("=")[0])
    assert got == value and type(got) is type(value)
    if isinstance(got, tuple):
        assert [type(item) for item in got] == [type(item) for item in value]


def test_a_comma_in_the_name_of_a_file_does_not_split_it(tmp_path):
    for name in ("a,b.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    files = f"{tmp_path}/a,b.jsonl", f"{tmp_path}/c.jsonl"
    for value in (files[:1], files[1:] * 2):
        assert load_config(Config, [f"--stages={','.join(value)}"]).stages == value


@pytest.mark.parametrize("flag, words", [
    ("--learning_rte=1", ["learning_rte", "'learning_rate'"]),
    ("--learning-rate=1", ["'learning_rate'"]),
    ("--max_steps=1.5", ["max_steps takes int", "'1.5'"]),
    ("--max_steps=True", ["int", "'True'"]),
    ("--max_steps=None", ["int", "'None'"]),
    ("--max_steps", ["--max_steps=VALUE"]),
    ("--name", ["--name=VALUE"]),
    ("--max_steps=0", ["must be positive", "0"]),
    ("--learning_rate=fast", ["float", "'fast'"]),
    ("--learning_rate=nan", ["nan"]),
    ("--compile=maybe", ["bool", "'maybe'"]),
    ("--dims=64,x", ["dims", "tuple[int, ...]", "'64,x'"]),
    ("--dims=64,,128", ["dims"]),
    ("--betas=0.9", ["betas", "1 items"]),
    ("--weights=sts", ["weights", "'sts'"]),
    ("--weights=sts:x", ["weights", "'sts:x'"]),
    ("--weights=sts:1,sts:2", ["twice"]),
    ("--kind=cubic", ["kind", "'linear', 'accelerating'", "'cubic'"]),
    ("--bits=12", ["8, 16"]),
    ("--=3", ["unknown key ''"]),
    ("max_steps=3", ["max_steps=3", "neither"]),
    ("-n", ["'-n'", "neither"]),
    ("config/no_such.py", ["config/no_such.py", "no such config file"]),
])
def test_wrong_argument_is_explained(flag, words):
    with pytest.raises(ConfigError) as caught:
        load_config(Config, [flag])
    for word in words + ([flag] if flag.startswith("--") and "steps=0" not in flag else []):
        assert word in str(caught.value)


@pytest.mark.parametrize("line, key, value", [
    ("learning_rate = 1", "learning_rate", 1.0),
    ("max_steps = 10 * 20", "max_steps", 200),
    ("dims = [64, 128]", "dims", (64, 128)),
    ("weights = {'sts': 2}", "weights", {"sts": 2.0}),
    ("warmup = None", "warmup", None),
    ("import math\n_base = 2\nmax_steps = _base * math.floor(3.5)", "max_steps", 6),
    ("# -*- coding: utf-8 -*-\nname = '汉'", "name", "汉"),
    ("bits = 16", "bits", 16),
])
def test_file(write, line, key, value):
    got = getattr(load_config(Config, [write(line)]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text, words", [
    ("\nlearning_rte = 1", [":2", "'learning_rte'", "'learning_rate'"]),
    ("max_steps = 1.0", [":1", "max_steps takes int", "1.0"]),
    ("max_steps = True", ["int", "True"]),
    ("max_steps = '5'", ["int", "'5'"]),
    ("learning_rate = '1e-4'", ["float", "'1e-4'"]),
    ("learning_rate = False", ["float", "False"]),
    ("learning_rate = 10 ** 400", ["float"]),
    ("compile = 1", ["bool", "1"]),
    ("name = None", ["str", "None"]),
    ("name = 3", ["str", "3"]),
    ("dims = 64", ["tuple[int, ...]", "64"]),
    ("dims = '64'", ["tuple[int, ...]", "'64'"]),
    ("stages = 'sft'", ["tuple[str, ...]", "'sft'"]),
    ("dims = (64, '128')", ["tuple[int, ...]"]),
    ("betas = (0.9, 0.95, 0.99)", ["3 items"]),
    ("weights = ['sts']", ["dict[str, float]"]),
    ("weights = {1: 1.0}", ["dict[str, float]"]),
    ("kind = 'cubic'", ["'linear', 'accelerating'", "'cubic'"]),
    ("kind = ['linear']", ["'linear', 'accelerating'"]),
    ("bits = 8.0", ["8, 16"]),
    ("from math import pi", ["'pi'"]),
    ("max_steps = 3\nname = (", ["line 2", "SyntaxError"]),
    ("max_steps = 3\nname = 1 / 0", [":2", "ZeroDivisionError"]),
    ("import sys\nsys.exit(3)", [":2", "SystemExit"]),
    ("max_steps = n_layer", [":1", "NameError", "n_layer"]),
    ("name = '\0'", ["x.py"]),
])
def test_wrong_file_is_explained(write, text, words):
    path = write(text)
    with pytest.raises(ValueError) as caught:
        load_config(Config, [path])
    for word in [path] + words:
        assert word in str(caught.value)


def test_the_error_is_both_a_value_error_and_a_type_error():
    for kind in (ValueError, TypeError):
        with pytest.raises(kind):
            load_config(Config, ["--max_steps=x"])


def test_later_wins_from_left_to_right(write):
    first, second = write("max_steps = 1\nname = 'a'", "a.py"), write("max_steps = 2", "b.py")
    assert load_config(Config, [first, second]).max_steps == 2
    assert load_config(Config, [second, first]).max_steps == 1
    assert load_config(Config, [first, second]).name == "a"
    assert load_config(Config, [first, "--max_steps=3", "--max_steps=4"]).max_steps == 4
    assert load_config(Config, ["--max_steps=3", first]).max_steps == 1


def test_derived_values_follow_the_last_source_and_are_made_once(write):
    assert load_config(Config, [write("max_steps = 50"), "--max_steps=300"]).derived == 30
    calls = []

    @dataclass(frozen=True)
    class Counted:
        x: int = 0

        def __post_init__(self):
            calls.append(self.x)

    load_config(Counted, [write("x = 1"), "--x=2", "--x=3"])
    assert calls == [3]


def test_a_config_file_sees_and_changes_nothing_of_ours(write):
    before = dict(vars(configurator))
    load_config(Config, [write("_convert = None\n__name__ = 'x'\nname = 'y'")])
    assert vars(configurator) == before
    assert load_config(Config, [write("name = str('Config' in globals())")]).name == "False"


def test_files_are_found_from_here_then_from_the_project(write, tmp_path, monkeypatch):
    project, here = tmp_path / "project", tmp_path / "here"
    for folder, steps in ((project, 1), (here, 2)):
        folder.mkdir()
        (folder / "x.py").write_text(f"max_steps = {steps}")
    monkeypatch.setattr(configurator, "PROJECT", project)
    monkeypatch.chdir(here)
    assert load_config(Config, ["x.py"]).max_steps == 2
    (here / "x.py").unlink()
    assert load_config(Config, ["x.py"]).max_steps == 1
    (project / "x.py").unlink()
    with pytest.raises(ConfigError, match="x.py: no such config file"):
        load_config(Config, ["x.py"])


def test_required_settings_are_asked_for():
    @dataclass(frozen=True)
    class Needs:
        checkpoint: str
        step: int = 0

    assert load_config(Needs, ["--checkpoint=out/x"]).checkpoint == "out/x"
    with pytest.raises(ConfigError, match="--checkpoint=VALUE"):
        load_config(Needs, ["--step=1"])
    assert re.search(r"--checkpoint=\(required\) +str", help_text(Needs))


def test_annotations_may_be_strings():
    late = dataclasses.make_dataclass("Late", [("x", "int | None", None)])
    assert load_config(late, ["--x=3"]).x == 3


def test_help_lists_type_default_and_comment(capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as caught:
            load_config(Config, ["--no_such=1", flag])
        assert caught.value.code == 0
    page = capsys.readouterr().out
    for line in (r"--max_steps=100 +int +optimizer steps",
                 r"--name='#toy' +str +run folder under out/",
                 r"--learning_rate=0.001 +float +peak, \"#1\" knob", r"--compile=False +bool$",
                 r"--dims=\(64, 128\) +tuple\[int, \.\.\.\] +MRL prefixes",
                 r"--out=None +str \| None$",
                 r"--weights=\{'sts': 1.0\} +dict\[str, float\]",
                 r"--kind='linear' +Literal\['linear', 'accelerating'\] +of alpha"):
        assert re.search(line, page, re.M), line
    assert "of its own line" not in page
    assert re.search(r"--task_weights=.*1.8\} .*shares of rows", help_text(TrainConfig))


SCRIPT = """
from dataclasses import dataclass
from configurator import load_config
@dataclass(frozen=True)
class C:
    x: int = 1
    dims: tuple[int, ...] = (1,)
if __name__ == "__main__":
    print(load_config(C))
"""


@pytest.mark.parametrize("args, code, out, err", [
    (["--x=2"], 0, "C(x=2, dims=(1,))\n", ""),
    (["--x=a"], 2, "", "script.py: error: --x=a: x takes int, not 'a'"),
    (["--y=2"], 2, "", "script.py: error: --y=2: unknown key 'y', the nearest is"),
    (["-h"], 0, "usage: python script.py", ""),
])
def test_command_line_gets_one_line_and_code_2_even_with_O(write, args, code, out, err):
    env = {**os.environ, "PYTHONPATH": str(Path(configurator.__file__).parent)}
    done = subprocess.run([sys.executable, "-O", write(SCRIPT, "script.py"), *args], env=env,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.startswith(out) and done.stderr.startswith(err)
    assert done.stderr.count("\n") == (code == 2)


def test_the_help_of_a_module_names_it_as_it_was_run(write):
    folder = Path(write(SCRIPT, "script.py")).parent
    path = os.pathsep.join(map(str, (folder, Path(configurator.__file__).parent)))
    out = subprocess.check_output([sys.executable, "-m", "script", "-h"], text=True, timeout=60,
                                  env={**os.environ, "PYTHONPATH": path})
    assert out.startswith("usage: python -m script [config.py")
