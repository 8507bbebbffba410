"""The built-in corpus: the documentation that is installed with this project's own dependencies.

Real text that nobody wrote for this purpose, on every machine that can run the project, without a
download: the docstrings of the standard library, torch, numpy, sympy, networkx, jinja2 ... and the
language reference that pydoc carries. It stands in for the paper's data at laptop scale
(PAPER Sec. 3.1.1, 3.1.2, Table 10, Table 11); every file is in a format that a user's own data has.

Nothing is imported to be read: Python sources are parsed with `ast`, and only the C modules of the
standard library, which have no source, are asked for their docstrings. Whole docstrings are the
pretraining text. (summary line -> body) and the pairs of pairs.py serve SFT and the weak stage, the
former are the dev and test collections too. Package labels and distances between qualified names
give the other two tasks.
"""
import ast
import hashlib
import importlib.util
import inspect
import os
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from engine.jsonl import atomic, write_jsonl
from toy.pairs import key_of, name_rows, parameter_rows, sentence_rows, sentences_of

# What `pip install -r requirements.txt` brings, the standard library aside. A fixed list, so that
# whatever else a reader has installed does not change the corpus.
PACKAGES = ("torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock",
            "fsspec", "requests", "urllib3", "charset_normalizer", "idna", "tqdm", "tiktoken",
            "pytest", "_pytest", "pluggy", "packaging", "pygments")
SKIP_PARTS = {"test", "tests", "testing", "_vendor", "__pycache__", "site-packages", "idlelib",
              "lib2to3", "ensurepip", "turtledemo", "benchmarks"}
DEV_SIZE = TEST_SIZE = 1000       # documents of the dev and the test collection
SUPERVISED_SIZE = 3000            # rows of a task of stage 4, which DHNM embeds before it starts
MAX_BODY_CHARS = 4000


# ---------------------------------------------------------------- reading what is installed

def source_files():
    """Yield (module name, path) of every Python source of the standard library and `PACKAGES`."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)      # finds without importing
        if spec and spec.submodule_search_locations:
            roots.append((package, Path(list(spec.submodule_search_locations)[0])))
    for package, root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIP_PARTS & set(parts) or any(p.startswith("test_") for p in parts):
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(filter(None, (package, *parts)))
            if name and path.stat().st_size < 2_000_000:
                yield name, path


def _literal(node):
    """Return the text of a string literal, also as `r\"\"\"...\"\"\".format(...)`, or None."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        return (left or "") + (right or "") or None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _attached_docstring(call):
    """Read docstrings that packages attach to C functions by a call; (name, text or None) or None.

    torch: `add_docstr(torch.linalg.det, "...")`; numpy: `add_newdoc(module, name, "...")`.
    """
    function = call.func.attr if isinstance(call.func, ast.Attribute) else \
        getattr(call.func, "id", "")
    args = call.args
    if function.endswith("add_docstr") and len(args) >= 2 and isinstance(args[0], ast.Attribute):
        return ast.unparse(args[0]), _literal(args[1])
    if function.startswith("add_newdoc") and len(args) >= 3:
        place, name, text = _literal(args[0]), _literal(args[1]), args[2]
        if isinstance(text, ast.Tuple) and len(text.elts) == 2:         # a method of a C class
            name, text = f"{name}.{_literal(text.elts[0])}", text.elts[1]
        if place and name:
            return f"{place.split('.')[0]}.{name}", _literal(text)
    return None


def read_source(item):
    """Parse one source file; return [(qualified name, docstring)] of what it documents."""
    module, path = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")           # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):        # templates and Python 2 files in packages
        return []
    entries = [(module, ast.get_docstring(tree))]

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}"
                entries.append((name, ast.get_docstring(child)))
                if isinstance(child, ast.ClassDef):
                    visit(child, name)
            elif isinstance(child, (ast.Expr, ast.Assign)) and isinstance(child.value, ast.Call):
                attached = _attached_docstring(child.value)
                if attached and isinstance(child, ast.Assign):      # det = _add_docstr(_C.det, "")
                    attached = (f"{prefix}.{ast.unparse(child.targets[0])}", attached[1])
                if attached:
                    entries.append(attached)
            elif isinstance(child, (ast.If, ast.Try)):
                visit(child, prefix)

    visit(tree, module)
    return [(name, text) for name, text in entries if text]


def read_builtins():
    """Return [(qualified name, docstring)] of the standard library's C modules."""
    stdlib = sysconfig.get_paths()["stdlib"]
    extensions = {p.name.split(".")[0] for p in Path(stdlib, "lib-dynload").glob("*.so")}
    names = (set(sys.builtin_module_names) | extensions) & set(sys.stdlib_module_names)
    entries = []
    for module in sorted(names):
        if module.startswith(("_test", "_xx", "xx", "_ctypes_test", "_tkinter")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")       # modules that a later Python drops
                loaded = importlib.import_module(module)
        except ImportError:                           # a system library is missing here
            continue
        public = module.lstrip("_")
        for attribute, value in sorted(vars(loaded).items()):
            documented = inspect.isroutine(value) or inspect.isclass(value)
            if attribute.startswith("__") or not documented:
                continue
            entries.append((f"{public}.{attribute}", _own_doc(value)))
            if inspect.isclass(value):
                entries += [(f"{public}.{attribute}.{name}", _own_doc(member))
                            for name, member in sorted(vars(value).items())
                            if not name.startswith("__") and callable(member)]
    return [(name, text) for name, text in entries if text]


def _own_doc(value):
    text = getattr(value, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else None


def read_topics():
    """Return [(topic, text)] of the language reference that pydoc carries."""
    from pydoc_data.topics import topics
    return [(f"python.{name}", text) for name, text in sorted(topics.items())]


# ---------------------------------------------------------------- summary line and body

SIGNATURE = re.compile(r"^[\w.\[\]]+\(.*|^.{0,120}\)\s*->\s*.*$")
ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")     # :func:`torch.add` -> torch.add
PLACEHOLDER = re.compile(r"\{\w+\}")                            # {input}, left by str.format


def split_summary(text):
    """Split a docstring into (summary, body); either is "" if the docstring has no such part.

    >>> split_summary("det(A) -> Tensor\\n\\nComputes the determinant.\\n\\nMore about it.")
    ('Computes the determinant.', 'More about it.')
    """
    text = ROLE.sub(r"\1", PLACEHOLDER.sub("", inspect.cleandoc(text))).replace("``", "`")
    blocks = [b.strip() for b in re.split(r"\n\s*\n", text) if b.strip()]
    while blocks and SIGNATURE.match(blocks[0].split("\n")[0]):
        # a signature, alone or glued to what follows; a C docstring may be nothing else
        lines = blocks[0].split("\n")
        closed = next((i for i, l in enumerate(lines) if ")" in l), len(lines) - 1)
        rest = "\n".join(lines[closed + 1:]).strip()
        blocks = ([rest] if rest else []) + blocks[1:]
    while blocks and re.match(r"^(\.\. |[=~*#-]{3,}|@)", blocks[0]):
        blocks.pop(0)                                 # a directive or a ruler is no summary
    if not blocks:
        return "", ""
    lines = blocks[0].split("\n")
    if len(lines) > 1 and re.match(r"^[=~*-]{3,}$", lines[1].strip()):
        lines = lines[:1] + lines[2:]                 # an underlined heading
        cut = 1
    else:                                             # up to the end of the first sentence
        cut = next((i + 1 for i, l in enumerate(lines) if l.rstrip().endswith((".", ":"))),
                   len(lines))
    summary = " ".join(l.strip() for l in lines[:cut])
    sentence = re.match(r"(.{20,}?[^.][.])\s+[A-Z`]", summary)
    tail = ""
    if sentence:                                      # the rest of the paragraph is body
        summary, tail = sentence.group(1), summary[sentence.end(1):].strip()
    body = [tail, "\n".join(lines[cut:]).strip(), *blocks[1:]]
    return summary, "\n\n".join(b for b in body if b)[:MAX_BODY_CHARS].strip()


def read_all():
    """Return the whole documentation as a sorted list of (qualified name, docstring)."""
    items = list(source_files())
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        entries = [e for part in pool.map(read_source, items, chunksize=64) for e in part]
    entries += read_builtins() + read_topics()
    unique, seen = {}, set()
    for name, text in sorted(set(entries), key=lambda e: (e[0].count("_"), len(e[0]), e)):
        key = key_of(text)
        if key and key not in seen and name not in unique and len(text) >= 20:
            seen.add(key)                             # of two names for a text the shortest stays
            unique[name] = text
    return sorted(unique.items())


# ---------------------------------------------------------------- the files

def _share(name):
    """Hash a qualified name to [0, 1): the split of an entry does not depend on the others."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64


def make_splits(entries):
    """Split entries into {"train" | "dev" | "test": [row]}; row: name, text, summary, body, keys.

    Dev and test hold the `DEV_SIZE` and `TEST_SIZE` pairs with the smallest hashes of their names,
    without equal summaries. A training row that repeats any of their texts is left out.
    """
    pairs, rest = [], []
    for name, text in entries:
        summary, body = split_summary(text)
        row = {"name": name, "text": text, "summary": summary, "body": body,
               "keys": [key_of(part) for part in (summary, body, text)]}
        (pairs if is_pair(row) else rest).append(row)
    times = Counter(row["keys"][0] for row in pairs)
    pairs.sort(key=lambda row: _share(row["name"]))
    single = [row for row in pairs if times[row["keys"][0]] == 1]
    dev, test = single[:DEV_SIZE], single[DEV_SIZE:DEV_SIZE + TEST_SIZE]
    seen = {key for row in dev + test for key in row["keys"] if key}
    train = [row for row in pairs + rest if not seen.intersection(row["keys"])]
    return {"train": sorted(train, key=lambda row: row["name"]), "dev": dev, "test": test}


def is_pair(row):
    """Tell whether a row has a summary and a body worth retrieving."""
    return 15 <= len(row["summary"]) <= 300 and len(row["body"]) >= 40


def label_of(name):
    """Name the part of the library that documents `name`: "torch.nn", "sympy.solvers", "email"."""
    parts = name.lstrip("_").split(".")
    deep = parts[0] in ("torch", "sympy", "numpy", "networkx", "mpmath") and len(parts) > 2
    return ".".join(parts[:2] if deep else parts[:1]).replace("._", ".")


def classification_rows(rows, least=25, seed=0):
    """Yield {query, pos, neg}: a text, the label that fits it, and 15 labels that do not."""
    labels = Counter(label_of(row["name"]) for row in rows)
    frequent = sorted(label for label, n in labels.items() if n >= least)
    rng = random.Random(seed)
    for row in rows:
        label = label_of(row["name"])
        if label in frequent:
            others = rng.sample([l for l in frequent if l != label], min(15, len(frequent) - 1))
            yield {"query": row["text"][:400], "pos": [label], "neg": others}


def relatedness(a, b):
    """Grade two qualified names in [0, 1]: the share of their path that they have in common.

    >>> relatedness("torch.nn.Linear.forward", "torch.nn.Linear.reset"), relatedness("os.a", "re.b")
    (0.75, 0.0)
    """
    a, b = a.split("."), b.split(".")
    common = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return 2 * common / (len(a) + len(b))


def sts_rows(rows, n=6000, seed=0):
    """Yield {sentence1, sentence2, score}: summaries graded by how near their names are.

    Half of the pairs are neighbours in the sorted list of names, the others are drawn at random.
    """
    rng = random.Random(seed)
    for i in range(n):
        first = rng.randrange(len(rows))
        near = first + rng.choice((-4, -3, -2, -1, 1, 2, 3, 4))
        second = near % len(rows) if i % 2 else rng.randrange(len(rows))
        if second != first:
            a, b = rows[first], rows[second]
            yield {"sentence1": a["summary"], "sentence2": b["summary"],
                   "score": round(relatedness(a["name"], b["name"]), 4)}


def labelled_rows(rows, least=16):
    """Yield {text, label, split} of labels with enough rows; every second row is "train"."""
    count, seen = Counter(label_of(row["name"]) for row in rows), Counter()
    for row in rows:
        label = label_of(row["name"])
        if count[label] >= least:
            seen[label] += 1
            yield {"text": row["text"][:400], "label": label,
                   "split": "train" if seen[label] % 2 else "test"}


def write_collection(directory, documents, queries, qrels):
    """Write a retrieval collection in BEIR's form; qrels: [(query id, id of its document)]."""
    write_jsonl(directory / "corpus.jsonl", documents)
    write_jsonl(directory / "queries.jsonl", queries)
    with atomic(directory / "qrels.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{query}\t{document}\t1\n" for query, document in qrels)


def versions():
    """Return what decides the entries: Python's version and those of the packages."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # a part of another distribution: _pytest
            versions[package] = metadata.version(package)
    return versions


def write(out):
    """Write the English files into the folder `out`; return {what: how many}.

    docs/data.md lists the files; search/corpus.jsonl has everything, for `embed.py --query`;
    sts_test.jsonl and labels_test.jsonl {text, label, split} are of test documents.
    """
    entries = read_all()
    splits = make_splits(entries)
    train, held_out = splits["train"], splits["dev"] + splits["test"]
    pairs = [row for row in train if is_pair(row)]
    banned = {key for row in held_out for key in
              (*row["keys"], *map(key_of, sentences_of(row["text"])))}
    write_jsonl(out / "text.jsonl", ({"text": row["text"]} for row in train))
    write_jsonl(out / "text_dev.jsonl", ({"text": row["text"]} for row in splits["dev"]))
    write_jsonl(out / "pairs" / "documentation.jsonl", (
        {"input": row["summary"], "output": row["body"], "name": row["name"]} for row in pairs))
    for name, make in (("sentences", sentence_rows), ("names", name_rows),
                       ("parameters", parameter_rows)):
        write_jsonl(out / "pairs" / f"{name}.jsonl", make(train, banned))
    supervised = sorted(pairs, key=lambda row: _share(row["name"]))[:SUPERVISED_SIZE]
    write_jsonl(out / "retrieval.jsonl", ({"query": row["summary"], "pos": [row["body"]],
                                           "id": row["name"]} for row in supervised))
    labelled = list(classification_rows(train))
    write_jsonl(out / "classification.jsonl", random.Random(0).sample(
        labelled, min(len(labelled), SUPERVISED_SIZE)))
    write_jsonl(out / "sts.jsonl", sts_rows(pairs))
    test = sorted(splits["test"], key=lambda row: row["name"])
    write_jsonl(out / "sts_test.jsonl", sts_rows(test, n=1000))
    write_jsonl(out / "labels_test.jsonl", labelled_rows(test))
    for split in ("dev", "test"):
        rows = splits[split]
        write_collection(out / split,
                         ({"id": row["name"], "title": "", "text": row["body"]} for row in rows),
                         ({"id": row["name"], "text": row["summary"]} for row in rows),
                         ((row["name"], row["name"]) for row in rows))
    write_jsonl(out / "search" / "corpus.jsonl",
                ({"id": name, "title": name, "text": text} for name, text in entries))
    return {"entries": len(entries), "train": len(train), "pairs": len(pairs)}
