"""The house rules, read from the source with `ast`: who imports whom, and what a file may hold."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {                             # the folders engine, toy, tools and experiments are rooms
    0: "configurator mask losses dhnm tokenizer metrics align",
    1: "engine",
    2: "model lora data toy",
    3: "clr embed tasks tools",
    4: "eval",
    5: "mixture",
    6: "train",
    7: "experiments",
}
FOLDERS = ("engine", "toy", "tools", "experiments")
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
REQUIRED = {"torch", "numpy", "tiktoken", "tqdm", "regex"}     # regex comes with tiktoken

SOURCES = sorted([*ROOT.glob("*.py"),
                  *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))])
CONFIGS = sorted(ROOT.glob("config/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def name_of(path):
    """mask.py -> mask, engine/checkpoint.py -> engine.checkpoint, engine/__init__.py -> engine."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def floor_of(module):
    """Return the floor of a module of this project, None for any other."""
    folder = module.split(".")[0]
    return FLOOR.get(folder if folder in FOLDERS else module)


def imported(tree):
    """Return {dotted name: line} of every import, those inside functions too."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:   # the second may be a module, too
                found |= {node.module: node.lineno, f"{node.module}.{alias.name}": node.lineno}
    return found


# ---------------------------------------------------------------- who imports whom

@each(SOURCES)
def test_every_file_has_its_floor(path):
    assert floor_of(name_of(path)) is not None, "give it a floor in this test and in the design"


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
    assert FLOOR["train"] > FLOOR["mask"] and floor_of("experiments.bench") == 7
    assert floor_of("engine.checkpoint") == 1 < floor_of("model")
    assert floor_of("utils") is None and not (ROOT / "utils.py").exists()


# ---------------------------------------------------------------- what a file may hold

@each(SOURCES)
def test_nothing_runs_at_import(path):
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
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
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main":
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"line {node.lineno}: {node.name} has {lines} lines"


def test_the_centre_of_the_project_is_at_most_50_lines():
    node = next(n for n in parse(ROOT / "train.py").body
                if isinstance(n, ast.FunctionDef) and n.name == "stage_loss")
    assert node.end_lineno - node.lineno + 1 <= 50


@each(SOURCES + CONFIGS + TESTS)
def test_lines_are_at_most_100_columns(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 100, f"line {number}: {len(line)} columns"


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
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            rest = node.body[1:] if ast.get_docstring(node) else node.body
            empty = all(isinstance(n, ast.Pass) or ast.unparse(n) == "..."
                        or ast.unparse(n).startswith("raise NotImplemented") for n in rest)
            assert not empty, f"line {node.lineno}: {node.name} is a stub"
