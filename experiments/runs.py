"""What a run leaves behind, read back; and how every command here writes its own result.

    read_log("out/embed_weak")[-1]["loss"]         # the last row of log.jsonl
    read_scores("out/embed_sup")                   # eval.json: {"task/set/subset/metric": number}
"""
import sys
from pathlib import Path

from engine.jsonl import read_jsonl, read_object, write_object


def read_log(folder):
    """Return the rows of a stage's log.jsonl."""
    return list(read_jsonl(Path(folder) / "log.jsonl"))


def read_scores(folder):
    """Return the flat scores of a stage's eval.json."""
    return read_object(Path(folder) / "eval.json")


def seconds(log):
    """Return the seconds of each row of a log, from its tokens and its tokens per second."""
    tokens = [0, *(row["tokens"] for row in log)]
    return [(b - a) / row["tokens_per_second"] for a, b, row in zip(tokens, tokens[1:], log)]


def mean(log, key, first=0.0, last=1.0):
    """Return the mean of a key over a part of the rows that have it, None if none has."""
    rows = [row[key] for row in log if key in row]
    part = rows[int(first * len(rows)):max(int(last * len(rows)), 1)]
    return sum(part) / len(part) if part else None


def score_of(scores, start, end):
    """Return the first score whose key has this start and this end, None without one."""
    return next((value for key, value in scores.items()
                 if key.startswith(start) and key.endswith(end)), None)


def ndcg_by_dims(scores):
    """Return {dims: nDCG@10 on the test questions} of the first dims of an embedding (MRL)."""
    parts = {int(key.partition(":")[2]): value for key, value in scores.items()
             if key.startswith("retrieval/") and "/test/ndcg@10:" in key}
    return dict(sorted(parts.items()))


def write_result(folder, name, result):
    """Write FOLDER/NAME.json and return its path."""
    path = Path(folder) / f"{name}.json"
    write_object(path, result)
    return path


def choose(commands, argv):
    """Return (the command that the first word names, all other words). ValueError without one.

    `--help` prints what the module says of itself, and ends.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["none"]
    if name in ("-h", "--help"):
        sys.exit(print(sys.modules["__main__"].__doc__))
    if name not in commands:
        raise ValueError(f"one of the commands {', '.join(commands)} is needed first, not {name}")
    return name, rest
