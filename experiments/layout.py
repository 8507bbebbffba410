"""Write one table of the paper: NAME.json for programs, NAME.md for readers, the same numbers.

    layout.write(cfg, "table5", "Table 5: practical factors", [{"Model": "ours", "Avg.": 61.2}],
                 ["Avg. is over six sets."])

A row is a dict, column -> value; the columns are those of all rows, in the order they come in. A
value may be a text, a number, a bool (a tick), a pair (mean, half-width of its interval) or None,
which stands for what is not known: the cell stays empty, and a note should say what fills it.
"""
import dataclasses
import json
from pathlib import Path


def cell(value, digits=2):
    """Write a value as Markdown.

    >>> [cell(v) for v in (None, 1503, 70.456, True, (70.4, 0.25), "x | y")]
    ['', '1,503', '70.46', '✓', '70.40 ± 0.25', 'x \\\\| y']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if isinstance(value, (tuple, list)):
        return " ± ".join(cell(part, digits) for part in value)
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown(rows, digits=2):
    """Return rows (dicts) as a Markdown table; numbers stand at the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = [[cell(column) for column in columns],
             ["--:" if right else "---" for right in numeric]]
    lines += [[cell(row.get(column), digits) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(name, cfg):
    """Return the command line that makes a table: its settings where they are not the default."""
    flags = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            flags.append(f" --{field.name}={text}")
    return f"python -m experiments.tables {name}{''.join(flags)}"


def write(cfg, name, title, rows, notes=(), digits=2, **more):
    """Write RESULTS/NAME.json and NAME.md, print the latter, return both paths.

    more: further values for the JSON file alone, such as the numbers of single seeds.
    """
    made = command(name, cfg)
    whole = {"title": title, "command": made, "rows": rows, "notes": list(notes), **more}
    text = "\n".join([f"**{title}**", "", markdown(rows, digits), "",
                      *(f"- {note}" for note in notes), f"- Made by `{made}`."])
    print(text)
    return write_files(cfg, name, whole, text)


def write_files(cfg, name, found, text):
    """Write RESULTS/NAME.json and NAME.md, at another scale NAME_SCALE; return the paths."""
    stem = Path(cfg.results) / (name if cfg.scale == "toy" else f"{name}_{cfg.scale}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    paths[0].write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(text.rstrip() + "\n", encoding="utf-8")
    return paths


def read(path):
    """Return the JSON object of a file, {} if it is not there."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
