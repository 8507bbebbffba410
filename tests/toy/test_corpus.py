"""corpus.py: docstrings found without importing, split into summary and body, kept apart."""
import json

import pytest

from toy import corpus


@pytest.mark.parametrize("text, summary, body", [
    ("Computes it.\n\nMore about it.", "Computes it.", "More about it."),
    ("det(A, *, out=None) -> Tensor\n\nComputes the determinant.\n\nMore.",
     "Computes the determinant.", "More."),
    ("sort(list,\n     key=None)\n\nSort a list in place.\n\nStable.", "Sort a list in place.",
     "Stable."),
    ("Return the sorted\nlist of nodes.\nIt is stable.\n\nArgs: none",
     "Return the sorted list of nodes.", "It is stable.\n\nArgs: none"),
    ("Return one value of many. Then a sentence.\n\nRest.", "Return one value of many.",
     "Then a sentence.\n\nRest."),
    ("Adds :func:`torch.add` and ``x``.\n\nSee {input}.", "Adds torch.add and `x`.", "See ."),
    ("The heading\n===========\n\nText.", "The heading", "Text."),
    ("f(x)", "", ""),
    ("", "", ""),
])
def test_summary_and_body(text, summary, body):
    assert corpus.split_summary(text) == (summary, body)


def test_sources_are_parsed_not_imported(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n'
                    '    def f(self):\n        """Method."""\n'
                    'if True:\n    def g():\n        """Inside if."""\n'
                    'det = _add_docstr(_C.det, r"""Attached {x}.""".format(x=1))\n'
                    'add_newdoc("numpy._core", "array", "Newdoc.")\n'
                    'add_newdoc("numpy._core", "nd", ("T", "Attribute."))\n')
    assert dict(corpus.read_source(("pkg.m", path))) == {
        "pkg.m": "Module.", "pkg.m.A": "Class.", "pkg.m.A.f": "Method.", "pkg.m.g": "Inside if.",
        "pkg.m.det": "Attached {x}.", "numpy.array": "Newdoc.", "numpy.nd.T": "Attribute."}
    path.write_text("def broken(:\n")
    assert corpus.read_source(("pkg.m", path)) == []


def test_c_modules_and_topics_are_there():
    names = dict(corpus.read_builtins())
    assert "cosine" in names["math.cos"] and "itertools.chain" in names
    assert "python.if" in dict(corpus.read_topics())


def test_no_test_text_is_in_the_training_split(monkeypatch):
    monkeypatch.setattr(corpus, "DEV_SIZE", 20)
    monkeypatch.setattr(corpus, "TEST_SIZE", 20)
    entries = [(f"lib.f{i}", f"Does the thing number {i // 2 if i > 100 else i} well.\n\n"
                f"This body belongs to the function with the number {i}.")
               for i in range(200)]
    splits = corpus.make_splits(entries)
    assert [len(splits[s]) for s in ("dev", "test")] == [20, 20]
    held = {row[part] for s in ("dev", "test") for row in splits[s]
            for part in ("name", "summary", "body")}
    kept = {row[part] for row in splits["train"] for part in ("name", "summary", "body")}
    assert not held & kept
    again = corpus.make_splits(entries + [("lib.new", "A new function is here.\n\n" + "x" * 50)])
    assert len({r["name"] for r in splits["test"]} & {r["name"] for r in again["test"]}) >= 18


def test_labels_and_relatedness():
    assert corpus.label_of("torch.nn.functional.relu") == "torch.nn"
    assert corpus.label_of("json.loads") == "json"
    assert corpus.label_of("_pytest.fixtures.f") == "pytest"
    assert corpus.relatedness("a.b.c", "a.b.c") == 1 and corpus.relatedness("a.b", "a.c") == 0.5
    rows = [{"name": f"os.path.f{i}", "text": f"text {i}", "summary": f"Does {i}"}
            for i in range(40)] + [{"name": f"re.g{i}", "text": f"t {i}", "summary": f"Makes {i}"}
                                   for i in range(40)]
    made = list(corpus.classification_rows(rows))
    assert len(made) == 80 and all(r["pos"][0] not in r["neg"] for r in made)
    pairs = list(corpus.sts_rows(rows, n=200))
    assert {0.0, 1.0} >= {min(p["score"] for p in pairs)} and max(p["score"] for p in pairs) > 0.5


def test_the_whole_corpus_is_built_and_kept(tmp_path, monkeypatch):
    """Real, but small: two packages instead of twenty and no standard library."""
    items = [i for i in corpus.source_files() if i[0].startswith(("jinja2", "networkx"))]
    monkeypatch.setattr(corpus, "source_files", lambda: iter(items))
    monkeypatch.setattr(corpus, "DEV_SIZE", 50)
    monkeypatch.setattr(corpus, "TEST_SIZE", 50)
    manifest = corpus.build(tmp_path)
    assert manifest["pairs"] > 500 and corpus.ensure(tmp_path) == manifest
    for line in open(tmp_path / "pairs" / "documentation.jsonl", encoding="utf-8"):
        row = json.loads(line)
        assert row["input"] and row["output"] and row["name"]
    names = [json.loads(line)["id"] for line in open(tmp_path / "search" / "corpus.jsonl")]
    assert len(names) == len(set(names)) and any("shortest_path" in name for name in names)
    (tmp_path / "manifest.json").write_text(json.dumps({"versions": {"corpus": -1}}))
    assert corpus.ensure(tmp_path)["pairs"] == manifest["pairs"]      # other versions: built anew
