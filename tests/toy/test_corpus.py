"""The built-in corpus: docstrings read without imports, split into summary and body, kept apart."""
import shutil

import pytest

from clr import LANGUAGES, script_share
from data import PARSERS
from engine.collection import load_collection
from engine.jsonl import read_jsonl
from toy import build, corpus, lexicon


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
    trained = {row[part] for row in splits["train"] for part in ("name", "summary", "body")}
    assert not held & trained
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
    labelled = list(corpus.classification_rows(rows))
    assert len(labelled) == 80 and all(r["pos"][0] not in r["neg"] for r in labelled)
    pairs = list(corpus.sts_rows(rows, n=200))
    assert {0.0, 1.0} >= {min(p["score"] for p in pairs)} and max(p["score"] for p in pairs) > 0.5


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The real thing, but small: jinja2 and a part of networkx instead of all sources."""
    parts = "jinja2", "networkx.algorithms.s", "networkx.classes"
    with pytest.MonkeyPatch.context() as patch:
        items = [item for item in corpus.source_files() if item[0].startswith(parts)]
        patch.setattr(corpus, "source_files", lambda: iter(items))
        patch.setattr(corpus, "DEV_SIZE", 50)
        patch.setattr(corpus, "TEST_SIZE", 50)
        folder = tmp_path_factory.mktemp("corpus")
        manifest = build.ensure(folder)
        yield folder, manifest


def rows_of(path):
    return list(read_jsonl(path))


def test_the_whole_corpus_is_built_once(small):
    folder, manifest = small
    assert manifest["pairs"] > 500 and manifest["clr"] > 500
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert build.ensure(folder) == manifest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")} == before
    names = [row["id"] for row in rows_of(folder / "search" / "corpus.jsonl")]
    assert len(names) == len(set(names)) and any("shortest_path" in name for name in names)


def test_a_language_without_phrasing_is_named(small, monkeypatch):
    phrase = lexicon.Phrasing()
    del phrase.frames["de"]
    monkeypatch.setattr(build, "Phrasing", lambda: phrase)
    with pytest.raises(ValueError, match="phrasing.tsv: no row for de$"):
        build.write_languages(small[0])


def test_every_file_is_in_a_format_of_data(small):
    folder, _ = small
    for path in folder.rglob("*.jsonl"):
        kind = "pairs" if path.parent.name == "pairs" else path.stem.split("-")[0].split("_")[0]
        if kind in PARSERS:
            for row in rows_of(path):
                PARSERS[kind](row)
    assert {path.stem for path in (folder / "pairs").iterdir()} == {
        "documentation", "sentences", "names", "parameters"}
    for name in ("dev", "test", "clr_test"):
        assert len(load_collection(folder / name).queries) >= 50


def test_held_out_documents_are_in_no_training_file(small):
    folder, _ = small
    held = {corpus.key_of(text) for name in ("dev", "test") for text in
            [row["text"] for row in rows_of(folder / name / "queries.jsonl")
             + rows_of(folder / name / "corpus.jsonl")]}
    held |= {corpus.key_of(row["text"]) for row in rows_of(folder / "text_dev.jsonl")}
    ids = {row["id"] for name in ("dev", "test")
           for row in rows_of(folder / name / "queries.jsonl")}
    files = [*(folder / "pairs").iterdir(), folder / "text.jsonl", folder / "retrieval.jsonl",
             folder / "clr.jsonl"]
    for path in files:
        for row in rows_of(path):
            texts = [row[key] for key in ("text", "query", "input", "output") if key in row]
            assert not held & {corpus.key_of(text) for text in texts + row.get("pos", [])}, path
            assert row.get("name") not in ids


def test_languages_are_text_in_stage_1_and_pairs_in_stage_4_alone(small):
    folder, manifest = small
    documents = rows_of(folder / "text-languages.jsonl")
    assert len({row["lang"] for row in documents}) >= 20 and "en" not in {
        row["lang"] for row in documents}
    size = {name: sum(len(row["text"]) for row in rows_of(folder / name))
            for name in ("text.jsonl", "text-languages.jsonl")}
    assert size["text-languages.jsonl"] / size["text.jsonl"] == pytest.approx(0.15, abs=0.01)
    for row in documents[:20]:
        assert row["text"].count("\n") == build.LINES - 1
    for path in (folder / "pairs").iterdir():
        for row in rows_of(path):
            assert script_share(row.get("query") or row["input"], "en") > 0.5
    assert "en" not in {row["lang"] for row in rows_of(folder / "clr.jsonl")}


def test_the_same_questions_in_every_language(small):
    queries = rows_of(small[0] / "clr_test" / "queries.jsonl")
    by_language = {}
    for row in queries:
        by_language.setdefault(row["lang"], []).append(row["id"].removesuffix(f"/{row['lang']}"))
    assert by_language.keys() == set(LANGUAGES)
    assert all(ids == by_language["en"] for ids in by_language.values())


def test_what_has_changed_is_built_anew(small, monkeypatch):
    folder, manifest = small
    monkeypatch.setattr(build, "VERSION", -1)
    for name in ("clr.jsonl", "text.jsonl"):
        (folder / name).write_text("old")
    assert build.ensure(folder)["pairs"] == manifest["pairs"]
    assert len(rows_of(folder / "clr.jsonl")) == manifest["clr"]
    assert len(rows_of(folder / "text.jsonl")) == manifest["train"]


def test_labels_are_held_out_half_and_half():
    rows = [{"name": f"torch.nn.layer{i}", "text": f"text {i}"} for i in range(16)]
    rows += [{"name": "email.parser", "text": "too few of this label"}]
    labelled = list(corpus.labelled_rows(rows))
    assert {row["label"] for row in labelled} == {"torch.nn"} and len(labelled) == 16
    assert [row["split"] for row in labelled[:4]] == ["train", "test", "train", "test"]


def test_files_are_built_anew_for_other_code_packages_or_tables(tmp_path, monkeypatch):
    tables, out, built = tmp_path / "tables", tmp_path / "out", []
    shutil.copytree(lexicon.HERE, tables)
    monkeypatch.setattr(lexicon, "HERE", tables)
    monkeypatch.setattr(corpus, "write", lambda folder: built.append(1) or {"pairs": 1})
    monkeypatch.setattr(build, "write_languages", lambda folder: {})
    build.ensure(out)
    build.ensure(out)
    assert len(built) == 1
    for n, change in enumerate((
            lambda: (tables / "words.tsv").write_text("x\ty\n"),
            lambda: monkeypatch.setattr(corpus, "versions", lambda: {"torch": "0"}),
            lambda: monkeypatch.setattr(build, "VERSION", -1)), 2):
        change()
        (out / "pairs").mkdir(exist_ok=True)               # an older version may have had more
        build.ensure(out)
        assert len(built) == n and not (out / "pairs").exists()
    monkeypatch.setattr(corpus, "write", lambda folder: 1 / 0)
    monkeypatch.setattr(build, "VERSION", -2)
    with pytest.raises(ZeroDivisionError):
        build.ensure(out)
    monkeypatch.setattr(corpus, "write", lambda folder: built.append(1) or {"pairs": 1})
    assert build.ensure(out)["pairs"] == 1 and len(built) == 5     # what is half built is not taken


@pytest.mark.parametrize("name, content", [("text.jsonl", "mine"), ("manifest.json", "{}")])
def test_a_folder_of_the_users_own_is_left_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="holds something else than the built-in corpus"):
        build.ensure(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rare_labels_and_the_share_of_neighbours():
    rows = [{"name": f"lib{i // 25}.f{i}", "text": f"text {i}"} for i in range(25 * 20)]
    rows += [{"name": f"rare.f{i}", "text": "x"} for i in range(24)]
    labelled = list(corpus.classification_rows(rows))
    assert len(labelled) == 500 and {len(set(row["neg"])) for row in labelled} == {15}
    assert all(row["pos"][0] not in row["neg"] and "rare" not in row["neg"] for row in labelled)
    rows = [{"name": f"lib{i // 25}.f{i}", "summary": ""} for i in range(25 * 20)]
    pairs = list(corpus.sts_rows(rows, n=2000))
    # of the near half one in ten crosses to another library, of the other 19 in 20
    assert sum(row["score"] > 0 for row in pairs) / len(pairs) == pytest.approx(0.475, abs=0.04)


def test_of_equal_texts_the_plainest_name_stays(monkeypatch):
    monkeypatch.setattr(corpus, "source_files", lambda: [])
    monkeypatch.setattr(corpus, "read_topics", lambda: [])
    monkeypatch.setattr(corpus, "read_builtins", lambda: [
        ("a._f", "It says the same here."), ("a.long", "It says the SAME here!"),
        ("a.f", "it says the same here"), ("b.f", "Too short.")])
    assert corpus.read_all() == [("a.f", "it says the same here")]
