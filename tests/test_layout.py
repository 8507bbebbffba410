"""The house rules, read from the source with `ast`: who imports whom, and what a file may hold."""
import ast
import dataclasses
import doctest
import importlib
import re
import sys

import pytest

import train
from engine import run as runs
from model import ConanConfig
from ranks import ROOT

FLOORS = {                             # the folders are rooms
    0: "configurator mask losses dhnm tokenizer",
    1: "engine",
    2: "model lora data",
    3: "clr embed",
    4: "toy eval sample",
    5: "train",
    6: "tools",
    7: "experiments",
}
FOLDERS = ("engine", "toy", "tools", "experiments")
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
REQUIRED = {"torch", "numpy", "tiktoken", "tqdm", "regex"}     # regex comes with tiktoken
SETTINGS = """
stage previous out resume seed
data text pairs retrieval clr classification sts evaluate skip_bad_lines query_len passage_len
vocab_size n_layer n_head n_kv_head n_embd ffn_dim block_size pooling pool_prompt
temperature dims task_weights
schedule mask_axis mask_apply
dhnm n_negatives pool_size
lora_rank steps batch_size batch_sizes micro_batch_size learning_rate warmup final_lr weight_decay
beta2
device dtype checkpointing compile parallel dry_run log_every save_every
"""

SOURCES = sorted([*ROOT.glob("*.py"),
                  *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))])
CONFIGS = sorted(ROOT.glob("config/**/*.py"))


def name_of(path):
    """mask.py -> mask, engine/checkpoint.py -> engine.checkpoint, engine/__init__.py -> engine."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def floor_of(module):
    """Return the floor of a module of this project, None for any other."""
    folder = module.split(".")[0]
    return FLOOR.get(folder if folder in FOLDERS else module)


def imported(tree):
    """Return {dotted name: line} of every import, those inside functions too."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:   # the second may be a module, too
                names |= {node.module: node.lineno, f"{node.module}.{alias.name}": node.lineno}
    return names


# ---------------------------------------------------------------- who imports whom

def test_the_root_is_the_paper():
    names = {name for name in FLOOR if name not in FOLDERS}
    assert {path.stem for path in ROOT.glob("*.py")} == names
    assert {path.name for path in ROOT.iterdir() if list(path.glob("*.py"))} - {"out"} == \
        {*FOLDERS, "config", "tests"}


@each(SOURCES)
def test_imports_go_down_only(path):
    here, folder = floor_of(name_of(path)), path.parent.name
    for module, line in imported(parse(path)).items():
        floor = floor_of(module)
        if floor is not None:
            assert floor < here or module.split(".")[0] == folder, f"line {line}: {module}"
        assert module.split(".")[0] not in ("tests", "config"), f"line {line}: {module}"


@each(SOURCES)
def test_what_is_not_required_is_imported_where_it_is_used(path):
    known = set(sys.stdlib_module_names) | REQUIRED | {name.split(".")[0] for name in FLOOR}
    for node in parse(path).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module]
            for name in names:
                assert name.split(".")[0] in known, f"line {node.lineno}: {name}"


@each(SOURCES)
def test_processes_meet_in_three_places_only(path):
    """torch.distributed is for train, engine and losses; the model knows nothing of ranks."""
    if name_of(path) in ("train", "losses") or name_of(path).startswith("engine"):
        return
    tree = parse(path)
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {name for name in names | set(imported(tree)) if name.startswith("torch.distributed")
            or name.startswith("torch.nn.parallel")}
    assert not used


def test_the_reader_of_an_import_can_tell_a_wrong_one():
    """The tests above would notice: an upward import, one inside a function, one of a package."""
    tree = ast.parse("import torch\nfrom engine import checkpoint\n"
                     "def f():\n    from train import x")
    assert imported(tree) == {"torch": 1, "engine": 2, "engine.checkpoint": 2, "train": 4,
                              "train.x": 4}
    assert floor_of("engine.checkpoint") == 1 < floor_of("model") < floor_of("experiments.bench")
    assert floor_of("utils") is None


# ---------------------------------------------------------------- what a file may hold

@each(SOURCES)
def test_nothing_runs_at_import(path):
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign,
               ast.FunctionDef, ast.ClassDef)
    for k, node in enumerate(parse(path).body):
        docstring = k == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or docstring or is_main_guard(node), \
            f"line {node.lineno}: {ast.unparse(node)[:60]}"


@each(CONFIGS)
def test_a_config_is_assignments_and_nothing_else(path):
    body = parse(path).body
    start = 1 if body and ast.get_docstring(parse(path)) else 0
    for node in body[start:]:
        assert isinstance(node, ast.Assign), f"line {node.lineno}: {ast.unparse(node)[:60]}"
        calls = [n for n in ast.walk(node) if isinstance(n, (ast.Call, ast.Lambda, ast.Attribute))]
        assert not calls, f"line {node.lineno}: {ast.unparse(calls[0])}"


@each(SOURCES)
def test_functions_fit_on_a_screen_and_take_few_arguments(path):
    for node in functions(parse(path)):
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 60, f"line {node.lineno}: {node.name} has {lines} lines"
        names = [a.arg for a in node.args.args if a.arg not in ("self", "cls", "ctx")]
        assert len(names) <= 6, f"line {node.lineno}: {node.name} takes {names}"


@each(SOURCES)
def test_everything_public_says_what_it_is(path):
    """Modules, and public functions, classes and methods; `forward` is its class's docstring."""
    tree = parse(path)
    assert ast.get_docstring(tree)

    def check(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) \
                    and not node.name.startswith("_") and node.name != "forward":
                assert ast.get_docstring(node), f"line {node.lineno}: {node.name}"
                if isinstance(node, ast.ClassDef):
                    check(node.body)
    check(tree.body)


@each(SOURCES + CONFIGS)
def test_nothing_is_left_for_later(path):
    text = path.read_text(encoding="utf-8")
    left = re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not left, f"line {text.count(chr(10), 0, left.start()) + 1}: {left.group()}"
    for node in functions(ast.parse(text)):
        rest = node.body[1:] if ast.get_docstring(node) else node.body
        empty = all(isinstance(n, ast.Pass) or ast.unparse(n) == "..."
                    or ast.unparse(n).startswith("raise NotImplemented") for n in rest)
        assert not empty, f"line {node.lineno}: {node.name} is a stub"


@each(SOURCES)
def test_examples_in_the_docstrings(path):
    assert doctest.testmod(importlib.import_module(name_of(path))).failed == 0


def test_the_model_is_plain():
    """What makes it fast is in engine/kernels.py, behind six names."""
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    for word in ("autograd", "is_compiling", "custom_op", "scaled_dot_product", "flash", "rank "):
        assert word not in text, word
    assert [f.__name__ for f in sys.modules["model"].OPERATIONS] == [
        "prepare", "rms_norm", "rope", "swiglu", "attention", "next_token_loss"]


# ---------------------------------------------------------------- the settings

def test_the_settings_of_a_run_are_these():
    """A new one must earn its place, here and in the reader's head."""
    assert [field.name for field in dataclasses.fields(train.TrainConfig)] == SETTINGS.split()


# PAPER App. A and Sec. 4.2, value by value; 16 chips share a batch of stage 4 (UNSPECIFIED)
APPENDIX_A = {
    "all": {"n_layer": 8, "n_embd": 3584, "n_head": 32, "n_kv_head": 8, "ffn_dim": 8192,
            "vocab_size": 150_000, "block_size": 32_768, "passage_len": 32_768,
            "query_len": 32_768, "weight_decay": 0.001, "parallel": "zero1", "mask_axis": "row",
            "mask_apply": "weights", "lora_rank": 0},
    "pretrain": {"learning_rate": 1e-4, "warmup": 0.05, "batch_size": 256,
                 "steps": 3_000_000_000_000 // (256 * 32_768)},
    "sft": {"learning_rate": 2e-5, "warmup": 0.02, "batch_size": 64, "steps": 600_000_000 // 64},
    "embed_weak": {"learning_rate": 1e-4, "warmup": 0.05, "batch_size": 64,
                   "steps": 600_000_000 // 64, "schedule": "linear"},
    "embed_sup": {"learning_rate": 1e-4, "warmup": 0.05, "batch_size": 4 * 16,
                  "batch_sizes": {"sts": 32 * 16}, "n_negatives": 7, "dhnm": "v2",
                  "dims": (256, 512, 1024, 1536, 2048, 3072, 3584),
                  "task_weights": {"retrieval": 3.0, "clr": 3.0, "classification": 2.8,
                                   "sts": 1.8}},
}


@pytest.fixture(scope="module")
def full():
    return runs.chain(train.TrainConfig, ["config/full/embed_sup.py"])


def test_the_full_configs_are_appendix_a(full):
    for cfg in full:
        for name, value in (APPENDIX_A["all"] | APPENDIX_A[cfg.stage]).items():
            assert getattr(cfg, name) == value, (cfg.stage, name)
    assert full[-1].model_config() == ConanConfig()        # whose parameters test_model.py counts


def test_the_full_stage_4_visits_queries_often_enough_for_dhnm(full):
    """PAPER Sec. 3.4: a replacement acts at the query's next visit."""
    cfg = full[-1]
    weights = {kind: w / cfg.batch_sizes.get(kind, cfg.batch_size)
               for kind, w in cfg.task_weights.items()}
    for kind, weight in weights.items():
        steps = cfg.steps * weight / sum(weights.values())
        rows = cfg.task_weights[kind] * 1e6                    # Table 11
        visits = steps * cfg.batch_sizes.get(kind, cfg.batch_size) / rows
        assert visits == pytest.approx(3, rel=1e-4), kind
