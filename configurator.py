"""Build one frozen, validated dataclass from config files and `--key=value` flags.

    torchrun train.py config/embed_sup.py my_run.py --learning_rate=1e-4 --dims=64,128

The dataclass of a script is the only list of its settings: names, types, defaults and, as trailing
comments, the help. Sources are merged from left to right, the later one wins. Then the dataclass is
built once. Anything wrong is a `ConfigError` that names file or flag, key and value. Config files
are Python, run in a namespace of their own: run those you trust.
"""
import ast
import dataclasses
import difflib
import inspect
import io
import os
import runpy
import sys
import tokenize
import traceback
from dataclasses import MISSING
from inspect import formatannotation
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

PROJECT = Path(__file__).resolve().parent


class ConfigError(ValueError, TypeError):
    """Say which setting is wrong, and where it was made; a wrong type is a TypeError, too."""


def load_config(cls, argv=None):
    """Return the dataclass `cls` with the settings of `argv` (None: the command line).

    Annotations may be bool, int, float, str, `X | None`, Literal, tuple[X, ...], tuple[X, Y] and
    dict[str, X]. Only int widens to float; lists become tuples. `-h` lists the fields and exits.
    Raises ConfigError, a ValueError. With `argv=None` it is printed as one line instead, and the
    process exits with code 2.
    """
    return from_command_line(lambda argv: build(cls, read_settings(cls, argv)), argv)


def from_command_line(parse, argv=None):
    """Return parse(argv), by default of the command line.

    There a ConfigError is printed as one line, and the exit code is 2.
    """
    try:
        return parse(sys.argv[1:] if argv is None else list(argv))
    except ConfigError as error:
        if argv is not None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_command(main):
    """Run a command; a mistake of its user ends it with one line."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def help_text(cls):
    """Return the `--help` page: a line for each field, with the comment that trails it in `cls`.

    A comment "# --- ..." is the heading of the fields below it.
    """
    comments, headings, heading, hints = {}, {}, "", get_type_hints(cls)
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("# ---"):
            heading = token.string.lstrip("# -")
        elif token.type == tokenize.COMMENT:
            comments.setdefault(token.line.partition(":")[0].strip(), token.string.lstrip("# "))
        elif token.type == tokenize.NAME and heading:
            headings[token.string], heading = heading, ""
    spec = getattr(sys.modules["__main__"], "__spec__", None)      # of `python -m NAME`
    command = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    lines = [f"usage: python {command} [config.py ...] [--key=value ...]", "",
             "The values shown hold where no config file sets others."]
    for field in dataclasses.fields(cls):
        lines += ["", headings[field.name]] if field.name in headings else []
        default = "(required)" if _is_required(field) else repr(
            field.default if field.default_factory is MISSING else field.default_factory())
        setting, kind = f"--{field.name}={default}", formatannotation(hints[field.name])
        lines.append(f"  {setting:<40} {kind:<20} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def read_settings(cls, argv):
    """Return {setting: value} of config files and flags, checked against `cls`, which is not built.

    Raises ConfigError for an unknown key or a value of the wrong type, by file and line.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    hints, values = get_type_hints(cls), {}
    for key, value, where, is_text in _settings(argv):
        if key not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}, the nearest is {nearest!r}")
        kind = formatannotation(hints[key])
        if is_text and value is None:
            if hints[key] is not bool:
                raise ConfigError(f"{where}: needs a value, --{key}=VALUE ({kind})")
            value = "true"
        try:
            values[key] = _convert(value, hints[key], is_text)
        except (ValueError, TypeError, OverflowError) as error:
            note = f": {error}" if str(error) else ""
            raise ConfigError(f"{where}: {key} takes {kind}, not {value!r}{note}") from None
    return values


def build(cls, values):
    """Return `cls` built from {setting: value}; ConfigError if one is missing or refused."""
    missing = [f"--{field.name}=VALUE" for field in dataclasses.fields(cls)
               if _is_required(field) and values.get(field.name, ()) == ()]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__, where a script validates and derives
        raise ConfigError(f"{cls.__name__}: {error}") from error


def _is_required(field):
    return field.default is field.default_factory is MISSING


def _settings(argv):
    """Yield (key, value, where it was made, is it command-line text) from left to right."""
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            yield key, text if equals else None, arg, True
        elif arg.endswith(".py"):
            yield from _read_file(arg)
        else:
            raise ConfigError(f"{arg!r} is neither a config file (*.py) nor --key=value")


def _read_file(name):
    path = next((path for path in (Path(name), PROJECT / name) if path.is_file()), None)
    if path is None:
        raise ConfigError(f"{name}: no such config file in {Path.cwd()} or {PROJECT}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        values = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else path       # a SyntaxError says its line itself
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    line = {node.id: f":{node.lineno}" for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for key, value in values.items():
        if not key.startswith("_") and not isinstance(value, ModuleType):
            yield key, value, f"{path}{line.get(key, '')}", False


def _convert(value, hint, is_text):
    """Return `value` as `hint`: parsed if it is command-line text, checked if it is from a file."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
        if value is None or is_text and value.lower() == "none":
            return None
        return _convert(value, next(arg for arg in args if arg is not NoneType), is_text)
    if origin is Literal:
        for choice in args:
            if value == str(choice) if is_text else value == choice and type(value) is type(choice):
                return choice
        raise ValueError
    if origin is tuple:
        if is_text:
            is_path = args[0] is str and os.path.exists(value)         # `a,b.jsonl` is one file
            value = [value] if is_path else _items(value)
        if not isinstance(value, (list, tuple)):
            raise TypeError
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(kinds):
            raise ValueError(f"{len(value)} items")
        return tuple(_convert(item, kind, is_text) for item, kind in zip(value, kinds))
    if origin is dict:
        if is_text:
            pairs = [[part.strip() for part in item.partition(":")[::2]] for item in _items(value)]
            if len(value := dict(pairs)) != len(pairs):
                raise ValueError("the same name twice")
        if not isinstance(value, dict):
            raise TypeError
        return {_convert(k, args[0], is_text): _convert(v, args[1], is_text)
                for k, v in value.items()}
    return _scalar(value, hint, is_text)


def _scalar(value, hint, is_text):
    if is_text and hint is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    elif is_text or hint is float and type(value) is int:
        value = hint(value)
    if type(value) is not hint:  # not isinstance: a bool is an int
        raise TypeError
    if value != value:
        raise ValueError("nan would poison the run")
    return value


def _items(text):
    """Split `64,128`, `(64, 128)` or `['a', 'b']`."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]") and text[0] not in text[1:]:       # not `(a),(b)`
        text = text[1:-1].strip()
    return [item.strip().strip("'\"") for item in text.removesuffix(",").split(",")] if text else []
