"""Build one frozen, validated dataclass from config files and `--key=value` flags.

    torchrun train.py config/embed_sup.py config/size_small.py --learning_rate=1e-4 --dims=64,128

The dataclass of a script is the only list of its settings: names, types, defaults and, as trailing
comments, the help. Sources are merged from left to right, the later one wins; then the dataclass is
built once, so what `__post_init__` derives cannot go stale. Anything wrong is a `ConfigError` that
names file or flag, key and value. Config files are Python, run in a namespace of their own:
assignments, where arithmetic and `_private` helpers are fine. They are code: run those you trust.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import runpy
import sys
import textwrap
import tokenize
import traceback
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

PROJECT = Path(__file__).resolve().parent


class ConfigError(ValueError, TypeError):
    """Say which setting is wrong, and where it was made.

    `--n_layer=two` is a wrong value and a wrong type alike: either `except` clause catches it.
    """


def load_config(cls, argv=None):
    """Return the dataclass `cls` with the settings of `argv` (None: the command line).

    Annotations may be bool, int, float, str, `X | None`, Literal, tuple[X, ...], tuple[X, Y] and
    dict[str, X]. Only int widens to float; lists become tuples. `-h` lists the fields and exits.

    Raises: ConfigError, a ValueError. With `argv=None` it is printed as one line instead, and the
    process exits with code 2, as command-line programs do.
    """
    try:
        return build(cls, read_settings(cls, sys.argv[1:] if argv is None else list(argv)))
    except ConfigError as error:
        if argv is not None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def split_args(argv=None):
    """Return (files, flags) as typed; of a flag given twice the last.

    >>> split_args(["config/sft.py", "--seed=1", "--compile", "--seed=2"])
    (['config/sft.py'], {'seed': '--seed=2', 'compile': '--compile'})
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = {arg[2:].partition("=")[0]: arg for arg in argv if arg.startswith("--")}
    return [arg for arg in argv if not arg.startswith("-")], flags


def help_text(cls):
    """Return the `--help` page: a line for each field, with the comment that trails it in `cls`."""
    comments, hints = _comments(cls), get_type_hints(cls)
    lines = [f"usage: python {Path(sys.argv[0]).name} [config.py ...] [--key=value ...]", ""]
    for field in _settable(cls).values():
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        shown = "(required)" if default is dataclasses.MISSING else repr(default)
        kind, comment = _name(hints[field.name]), comments.get(field.name, "")
        lines.append(f"  {f'--{field.name}={shown}':<40} {kind:<20} {comment}".rstrip())
    return "\n".join(lines)


def read_settings(cls, argv):
    """Return {setting: value} of config files and flags, checked against `cls`, which is not built.

    Raises ConfigError for an unknown key or a value of the wrong type, by file and line.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    fields, hints, values = _settable(cls), get_type_hints(cls), {}
    for key, value, where, is_text in _settings(argv):
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
            raise ConfigError(f"{where}: unknown key {key!r}, the nearest is {', '.join(near)!r}")
        kind = _name(hints[key])
        if is_text and value is None and hints[key] is not bool:
            raise ConfigError(f"{where}: needs a value, --{key}=VALUE ({kind})")
        try:
            value = "true" if is_text and value is None else value
            values[key] = _convert(value, hints[key], is_text)
        except (ValueError, TypeError, OverflowError) as error:
            note = f": {error}" if str(error) else ""
            raise ConfigError(f"{where}: {key} takes {kind}, not {value!r}{note}") from None
    return values


def build(cls, values):
    """Return `cls` built from {setting: value}; ConfigError if one is missing or refused."""
    fields = _settable(cls)
    missing = [key for key, field in fields.items() if key not in values
               and field.default is field.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{cls.__name__} needs " + ", ".join(f"--{key}=VALUE" for key in missing))
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__, where a script validates and derives
        raise ConfigError(f"{cls.__name__}: {error}") from error


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
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        where = f"{path}:{lines[-1]}" if lines else path
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
        return _convert(value, args[args[0] is NoneType], is_text)
    if origin is Literal:
        known = {str(choice) if is_text else (type(choice), choice): choice for choice in args}
        wanted = value if is_text else (type(value), value)  # the type, as True == 1
        if wanted not in known:
            raise ValueError
        return known[wanted]
    if origin is tuple:
        items = _items(value) if is_text else value
        items = _join_paths(items) if is_text and args[0] is str else items
        if not isinstance(items, (list, tuple)):
            raise TypeError
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(kinds):
            raise ValueError(f"{len(items)} items")
        return tuple(_convert(item, kind, is_text) for item, kind in zip(items, kinds))
    if origin is dict:
        if is_text:
            pairs = [[part.strip() for part in item.partition(":")[::2]] for item in _items(value)]
            if len(value := dict(pairs)) != len(pairs):
                raise ValueError("the same name twice")
        if not isinstance(value, dict):
            raise TypeError
        pairs = value.items()
        return {_convert(k, args[0], is_text): _convert(v, args[1], is_text) for k, v in pairs}
    return _scalar(value, hint, is_text)


def _scalar(value, hint, is_text):
    if hint not in (bool, int, float, str):
        raise NotImplementedError(f"no setting can be annotated as {_name(hint)}")
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
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()
    return [item.strip().strip("'\"") for item in text.removesuffix(",").split(",")] if text else []


def _join_paths(items):
    """Undo the split at commas inside the name of a file or folder that exists: `a,b.jsonl`."""
    items, joined = list(items), []
    while items:
        n = next((n for n in range(len(items), 1, -1) if Path(",".join(items[:n])).exists()), 1)
        joined.append(",".join(items[:n]))
        items = items[n:]
    return joined


def _settable(cls):
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _name(hint):
    plain = isinstance(hint, type) and not get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "")


def _comments(cls):
    """Return {field: the comment that trails it}; empty where there is no source to read."""
    comments = {}
    for base in cls.__mro__:
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments.setdefault(token.line.partition(":")[0].strip(), token.string.lstrip("# "))
    return comments
