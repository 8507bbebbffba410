"""A folder of sets becomes the files of the four stages: every form by a set of a few rows."""

import json

import pytest

from data import PARSERS
from engine.collection import load_collection
from engine.jsonl import read_jsonl
from ranks import write_lines as write
from tools import sets


def collection(folder, queries, corpus, qrels):
    write(folder / "queries.jsonl.gz", queries)
    write(folder / "corpus.jsonl", corpus)
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t1" for q, d in qrels)]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    """One small set of every form."""
    root = tmp_path / "root"
    for name in ("qa", "qa_dev"):
        collection(
            root / name,
            [{"id": "en/1", "text": f"Who of {name}?", "lang": "en"},
             {"id": "de/1", "text": f"Wer von {name}?", "lang": "de"},
             *([{"id": "en/2", "text": "Held out?", "lang": "en", "split": "dev"}]
               if name == "qa" else [])],
            [{"id": "p1", "title": "T", "text": "A first. A second. A third.", "lang": "en"},
             {"id": "p2", "text": "Held out, too.", "split": "dev" if name == "qa" else None}],
            [("en/1", "p1"), ("de/1", "p1"), *([("en/2", "p1")] if name == "qa" else [])])
    write(root / "bi" / "pairs.jsonl", [
        {"query": f"Satz {i}", "pos": f"Sentence {i}", "lang_q": "de", "lang_p": "en"}
        for i in range(40)])
    write(root / "news" / "docs.jsonl", [{"id": i, "doc": f"news.{i // 8}"} for i in range(80)])
    write(root / "news" / "sentences.jsonl.gz", [
        {"id": i, "lang": lang, "text": f"{lang} news {i}."} for i in range(80)
        for lang in ("en", "fr", "ru")])
    write(root / "sim" / "data.jsonl", [
        {"id": "1", "sentence1": f"{lang} a", "sentence2": f"{lang} b", "lang": lang,
         "score": 2.5 if split == "train" else 1, "split": split}
        for split in ("train", "dev") for lang in ("en", "ja")])
    write(root / "topics" / "data.jsonl", [
        {"text": f"about {label} {i}", "label": label, "lang": "en", "split": split}
        for i, split in enumerate(("train", "train", "test")) for label in ("a_b", "c", "d")])
    write(root / "pages" / "pages.jsonl", [
        {"id": "x", "lang": lang, "title": f"{lang} title", "summary": "short",
         "text": f"{lang} long text."} for lang in ("en", "ko")])
    write(root / "plain" / "data.jsonl", [{"text": "One. Two. Three. Four.", "lang": "en"}])
    write(root / "asked" / "data.jsonl", [
        {"query": "Why?", "pos": "Because.", "neg": ["No."], "prompt": "Answer"},
        {"query": "How?", "pos": ["So.", "Thus."]}, {"query": "Who?", "pos": "I.", "prompt": ""}])
    return root


@pytest.fixture
def built(root, tmp_path):
    """The files made of it: {kind: rows}."""
    sets.build(root, tmp_path / "sets")
    files = {}
    for path in (tmp_path / "sets").rglob("*.jsonl"):
        kind = str(path.relative_to(tmp_path / "sets").with_suffix(""))
        files[kind] = list(read_jsonl(path))
    return files


def test_everything_is_used_and_readable(built):
    assert {"text", "retrieval", "clr", "classification", "sts/sim"} <= built.keys()
    for name, rows in built.items():
        kind = name.split("/")[0]
        for row in rows if kind in PARSERS else ():
            PARSERS[kind](row)


def test_question_and_passage_by_their_own_prompt_and_negatives(built):
    own = {"query": "Why?", "pos": ["Because."], "neg": ["No."], "prompt": "Answer"}
    for kind in ("retrieval", "pairs/others"):
        assert own in built[kind] and {"query": "How?", "pos": ["So.", "Thus."]} in built[kind]
        assert {"query": "Who?", "pos": ["I."], "prompt": ""} in built[kind]


@pytest.mark.parametrize("pos", ["Sentence", ["Sentence"]])
def test_a_passage_may_be_a_string_or_a_list(tmp_path, pos):
    write(tmp_path / "root" / "bi" / "x.jsonl", [
        {"query": f"Satz {i}", "pos": pos, "lang_q": "de", "lang_p": "en"} for i in range(4)])
    sets.build(tmp_path / "root", tmp_path / "sets")
    rows = [row for path in (tmp_path / "sets").rglob("pairs/*.jsonl") for row in read_jsonl(path)]
    rows += [{"query": row["query"], "pos": [row["pos"]]}
             for path in (tmp_path / "sets").rglob("held_out/*/*.jsonl")
             for row in read_jsonl(path)]
    assert len(rows) == 4
    assert all({row["query"][:4], row["pos"][0][:4]} == {"Satz", "Sent"} for row in rows)


def test_files_that_share_a_stem_are_all_read_and_backups_are_not(tmp_path):
    folder = tmp_path / "root" / "bi"
    for lang in ("de", "fr"):
        write(folder / f"train.en-{lang}.jsonl", [{"text": f"{lang} {i}"} for i in range(3)])
    write(folder / "train.en-de.jsonl.bak", [{"text": "backup"}])
    (folder / "train.en-de.jsonl.report.json").write_text('{"a": "report"}')
    sets.build(tmp_path / "root", tmp_path / "sets")
    assert {row["text"] for row in read_jsonl(tmp_path / "sets" / "text.jsonl")} == {
        f"{lang} {i}" for lang in ("de", "fr") for i in range(3)}
    write(folder / "train.en-de.ndjson", [{"text": "which one?"}])
    with pytest.raises(ValueError, match="train.en-de.ndjson: there is another file train.en-de"):
        sets.build(tmp_path / "root", tmp_path / "again")


def test_a_document_judged_irrelevant_is_no_positive(tmp_path):
    folder = tmp_path / "root" / "qa"
    collection(folder, [{"id": "q", "text": "Who?", "lang": "en"}],
               [{"id": d, "text": f"{d} text.", "lang": "en"} for d in ("good", "bad")],
               [("q", "good")])
    with open(folder / "qrels.tsv", "a") as file:
        file.write("q\tbad\t0\n")
    sets.build(tmp_path / "root", tmp_path / "sets")
    rows = list(read_jsonl(tmp_path / "sets" / "retrieval.jsonl"))
    assert [row["pos"] for row in rows] == [["good text."]]


def test_question_and_passage_of_one_language_is_retrieval_of_two_is_clr(built):
    asked = {row["query"] for row in built["retrieval"]}
    assert "Who of qa?" in asked and "Wer von qa?" not in asked
    crossed = {(row["query"], row["pos"][0]) for row in built["clr"]}
    assert ("Wer von qa?", "T A first. A second. A third.") in crossed
    assert all(row["lang_q"] != row["lang_p"] for row in built["clr"])


def test_nothing_of_a_dev_set_or_a_held_out_split_is_trained_on(built):
    trained = json.dumps({kind: rows for kind, rows in built.items()
                          if not kind.startswith(("held_out", "qa_dev"))})
    for held in ("qa_dev", "Held out?", "Held out, too.", '"about c 2"'):
        assert held not in trained
    assert sum(row["score"] == 2.5 for row in built["sts/sim"]) == len(built["sts/sim"])


def test_held_out_bitext_and_documents_do_not_meet_the_training_rows(built):
    held = {row["pos"] for row in built["held_out/bi/pairs"]}
    trained = {text for kind, rows in built.items() if kind.startswith("pairs/")
               for row in rows for text in (row["query"], *row["pos"])}
    assert held and not held & trained
    news = {row["text"] for row in built["held_out/news/sentences"]}
    documents = [row["id"] // 8 for row in built["held_out/news/sentences"]]
    assert {documents.count(document) for document in documents} == {8 * 3}   # whole, all languages
    assert not any(text in passage for text in news for passage in trained)


def test_paragraphs_hold_the_sentence_in_another_language(built):
    rows = [row for row in built["clr"] if " news " in row["query"]]
    assert rows
    for row in rows:
        number = row["query"].split()[-1]
        assert f"{row['lang_p']} news {number}" in row["pos"][0]
        numbers = [int(word[:-1]) for word in row["pos"][0].split() if word[0].isdigit()]
        assert len({n // 8 for n in numbers}) == 1


def test_labels_are_words_and_the_other_labels_are_negatives(built):
    row = next(row for row in built["classification"] if row["query"] == "about a_b 0")
    assert row["pos"] == ["a b"] and sorted(row["neg"]) == ["c", "d"]


def test_bitext_carries_no_instruction_and_questions_the_default_one(built):
    rows = [row for kind, rows in built.items() if kind.startswith("pairs/") for row in rows]
    assert {row.get("prompt", "default") for row in rows if row["query"].startswith("Satz")} <= {""}
    assert "default" in {row.get("prompt", "default") for row in rows
                         if row["query"] == "Wer von qa?" and row["pos"][0].startswith("T ")}


def test_two_builds_are_equal(root, tmp_path):
    for name in ("a", "b"):
        sets.build(root, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jsonl"))
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_it_does_not_know_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        sets.build(tmp_path / "nowhere", tmp_path / "out")
    write(tmp_path / "root" / "odd" / "data.jsonl", [{"thing": 1}])
    with pytest.raises(ValueError, match="odd.*thing"):
        sets.build(tmp_path / "root", tmp_path / "out")
    write(tmp_path / "root" / "odd" / "data.jsonl", [{"text": "a", "label": "b"}, {"text": "c"}])
    with pytest.raises(ValueError, match="data.jsonl:2: key 'label' is missing"):
        sets.build(tmp_path / "root", tmp_path / "out")
    write(tmp_path / "root" / "odd" / "data.jsonl", [{"text": "a", "title": "b", "id": "c"}])
    sets.build(tmp_path / "root", tmp_path / "english")            # no `lang`
    assert list((tmp_path / "english" / "pairs").glob("*.jsonl"))
    write(tmp_path / "root" / "odd" / "data.jsonl", [{"id": 1, "sentence1": "a", "sentence2": "b",
                                                      "score": 1, "lang": lang} if lang else
                                                     {"id": 1, "sentence1": "c", "sentence2": "d",
                                                      "score": 1} for lang in ("de", None)])
    with pytest.raises(ValueError, match="odd/data.jsonl: a row has no key 'lang'"):
        sets.build(tmp_path / "root", tmp_path / "out")
    for rows, reason in (
            ([{"text": 7, "label": "b"}], "1: key 'text' must be str, not int"),
            ([{"query": "q", "pos": "p"}, {"query": "", "pos": "p"}], "2: key 'query' is empty"),
            ([{"sentence1": "a", "sentence2": "b", "score": "1"}], "1: key 'score' must be"),
            ([{"sentence1": "a", "sentence2": "b", "label": "1"}], "1: key 'label' must be 0 or 1"),
            ([{"text": "a", "keywords": 5}], "1: summary and keywords must be text, not 5"),
            ([{"text": "a", "keywords": ["b", 2]}], "1: summary and keywords must be"),
            ([{"text": "a", "title": "b", "id": 1, "summary": ["c"]}], "1: summary and keywords")):
        write(tmp_path / "root" / "odd" / "data.jsonl", rows)
        with pytest.raises(ValueError, match=f"data.jsonl:{reason}"):
            sets.build(tmp_path / "root", tmp_path / "out")
    (tmp_path / "root" / "odd" / "data.jsonl").write_text("")
    with pytest.raises(ValueError, match="odd.*no rows"):
        sets.build(tmp_path / "root", tmp_path / "out")


def test_small_files_are_joined_by_set_then_all(tmp_path):
    builder = sets.Builder(tmp_path)
    for name, lang, n in (("a", "de", 3), ("a", "fr", 700), ("b", "de", 400), ("b", "fr", 400)):
        builder.name = name
        for i in range(n):
            builder.add("pairs", f"{lang} {i}", f"english {i}", "bitext-", lang_q=lang,
                            lang_p="en")
    builder.join_small()
    assert {kind: len(rows) for kind, rows in builder.files.items()} == {
        "pairs/a-bitext-en-fr": 700,                   # enough for a file of its own
        "pairs/b-bitext-en": 800,                      # enough together
        "pairs/others": 3}


def test_evaluation_folders_are_found(root):
    assert [p.name for p in sets.held_out_collections(str(root))] == ["qa_dev"]


def test_of_a_collection_with_splits_the_training_questions_are_taken(tmp_path):
    root = tmp_path / "root"
    for name in ("qa", "qa_test"):
        collection(root / name, [{"id": f"en/{split}", "text": f"A {split} question?", "lang": "en"}
                                 for split in ("train", "test")],
                   [{"id": "p", "text": "It answers.", "lang": "en"}], [])
        (root / name / "qrels.tsv").unlink()
        (root / name / "qrels").mkdir()
        for split in ("train", "test"):
            (root / name / "qrels" / f"{split}.tsv").write_text(f"en/{split}\tp\t1\n")
    sets.build(root, tmp_path / "sets")
    assert [row["query"] for row in read_jsonl(tmp_path / "sets" / "retrieval.jsonl")] == [
        "A train question?"]
    assert len(load_collection(tmp_path / "sets" / "qa_test", "test").queries) == 1


def test_a_kind_without_rows_has_no_file(tmp_path):
    text = "Of this sentence and the next. Either says all the other does."       # no crop of two
    write(tmp_path / "root" / "plain" / "data.jsonl", [{"text": text, "lang": "en"}])
    made = sets.build(tmp_path / "root", tmp_path / "sets")
    assert set(made) == {"text"}
    assert [path.name for path in (tmp_path / "sets").glob("*.jsonl")] == ["text.jsonl"]


ROWS = {                           # a row of every form but collections
    "bitext_rows": {"query": "{} Satz", "pos": "{} sentence", "lang_q": "de", "lang_p": "en"},
    "questions": {"query": "{} query", "pos": "{} passage"},
    "sts": {"sentence1": "{} one", "sentence2": "{} two", "score": 1},
    "paraphrases": {"sentence1": "{} one", "sentence2": "{} two", "label": 1},
    "documents": {"id": "{}", "title": "{} title", "text": "{} body. And more. Still more."},
    "parallel": {"id": "{}", "lang": "en", "text": "{} text", "label": "{} label"},
    "labels": {"text": "{} text", "label": "{} label"},
    "running_text": {"text": "{} text. And more. Still more.", "lang": "en"}}


def test_every_form_has_a_row_here():
    assert {form.__name__ for form, *_ in sets.Builder.FORMS} == ROWS.keys()


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_split_test_train_nothing_in_any_form(tmp_path, form):
    rows = [{key: value.format(f"{split} {i}") if isinstance(value, str) else value
             for key, value in ROWS[form].items()} | {"split": split}
            for split in ("train", "test") for i in range(30)]
    write(tmp_path / "root" / "one" / "x.jsonl", rows)
    sets.build(tmp_path / "root", tmp_path / "sets")
    text = "".join(path.read_text() for path in (tmp_path / "sets").rglob("*.jsonl"))
    assert "train 7" in text and "test " not in text


def test_files_that_are_named_after_a_held_out_split_train_nothing(tmp_path):
    for split in ("train", "dev", "validation", "test"):
        write(tmp_path / "root" / "one" / f"{split}.jsonl",
              [{"query": f"{split} query {i}", "pos": f"{split} passage {i}"} for i in range(9)])
    sets.build(tmp_path / "root", tmp_path / "sets")
    rows = list(read_jsonl(tmp_path / "sets" / "retrieval.jsonl"))
    assert len(rows) == 9 and all(row["query"].startswith("train") for row in rows)


def test_held_out_parallel_sentences_are_no_classification_rows(tmp_path):
    write(tmp_path / "root" / "one" / "x.jsonl", [
        {"id": i, "lang": lang, "text": f"{lang} text {i}", "label": str(i % 3)}
        for i in range(60) for lang in ("en", "de")])
    sets.build(tmp_path / "root", tmp_path / "sets")
    held = {row["text"] for row in read_jsonl(tmp_path / "sets/held_out/one/x.jsonl")}
    asked = {row["query"] for row in read_jsonl(tmp_path / "sets/classification.jsonl")}
    assert held and asked and not held & asked


def test_labelled_texts_with_ids_are_documents_too(tmp_path):
    write(tmp_path / "root" / "one" / "x.jsonl", [
        {"id": i, "text": f"text {i}", "label": str(i % 3)} for i in range(9)])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    assert len(files["text"]) == len(files["classification"]) == 9


def test_a_set_of_several_forms_holds_nothing_out(tmp_path):
    """Pages may have the very sentences of the bitext beside them."""
    folder = tmp_path / "root" / "manual"
    write(folder / "bitext.jsonl", [{"query": f"Satz {i}", "pos": f"Sentence {i}", "lang_q": "de",
                                     "lang_p": "en"} for i in range(40)])
    write(folder / "pages.jsonl", [{"id": i, "title": f"page {i}", "text": f"Sentence {i}."}
                                   for i in range(40)])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    assert not (tmp_path / "sets/held_out").exists()
    assert {f"Satz {i}\nSentence {i}" for i in range(40)} <= {
        "\n".join(sorted(row["text"].split("\n"))) for row in files["text"]}


@pytest.mark.parametrize("name", ["{lang}/{i}", "{i}/{lang}"])
def test_only_translations_of_one_question_are_bitext(tmp_path, name):
    corpus = [{"id": f"p{i}", "text": f"passage {i}", "lang": "en"} for i in range(3)]
    queries = [{"id": name.format(lang=lang, i=i), "text": f"{lang} question {i}", "lang": lang}
               for i in range(3) for lang in ("de", "en")]
    collection(tmp_path / "root" / "qa", queries, corpus,
               [(row["id"], f"p{row['text'][-1]}") for row in queries])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    rows = [row for row in files["pairs/others"] if row.get("prompt") == ""]
    assert sorted(sorted([row["query"], *row["pos"]]) for row in rows) == [
        [f"de question {i}", f"en question {i}"] for i in range(3)]


def test_two_languages_with_documents_give_no_query_its_own_language(tmp_path):
    root = tmp_path / "root"
    write(root / "news" / "docs.jsonl", [{"id": i, "doc": f"d{i // 5}"} for i in range(100)])
    write(root / "news" / "x.jsonl", [{"id": i, "lang": lang, "text": f"{lang} {i}."}
                                      for i in range(100) for lang in ("de", "en")])
    sets.build(root, tmp_path / "sets")
    rows = list(read_jsonl(tmp_path / "sets" / "clr.jsonl"))
    assert len(rows) > 100 and all(row["lang_q"] != row["lang_p"] for row in rows)


def test_blank_texts_are_passed_over(tmp_path):
    root = tmp_path / "root"
    write(root / "plain" / "x.jsonl", [{"text": text} for text in ("", " ", "words")])
    write(root / "sim" / "x.jsonl", [{"sentence1": text, "sentence2": "b", "score": 1}
                                     for text in ("", "a")])
    files = sets.build(root, tmp_path / "sets")
    assert [row["sentence1"] for row in files["sts/sim"]] == ["a"]
    assert {row["text"] for row in files["text"]} == {"words", "a"}


def test_an_id_that_is_null_is_none(tmp_path):
    write(tmp_path / "root" / "sim" / "x.jsonl", [
        {"id": None, "sentence1": f"{lang} {i}", "sentence2": "b", "score": i, "lang": lang}
        for i in range(3) for lang in ("de", "en")])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    assert len(files["sts/sim"]) == 6 and not [kind for kind in files if kind.startswith("pairs")]


@pytest.mark.parametrize("name", ["test", "dev", "nq-test", "nq_dev"])
def test_a_set_to_evaluate_on_is_told_by_its_name(tmp_path, name):
    write(tmp_path / "root" / name / "x.jsonl", [{"text": "held out"}])
    write(tmp_path / "root" / "contest" / "TEST.jsonl", [{"text": "held out"}])
    write(tmp_path / "root" / "contest" / "x.jsonl", [{"text": "words"}])
    assert sets.build(tmp_path / "root", tmp_path / "sets")["text"] == [{"text": "words"}]


def test_what_a_row_may_lack_costs_no_row(tmp_path):
    """A split that is null, a question that is not judged, a sentence of no document, no id."""
    root = tmp_path / "root"
    write(root / "asked" / "a.jsonl", [{"query": f"q{i}", "pos": "p", "split": split}
                                       for i, split in enumerate(("train", None, "test"))])
    write(root / "same" / "a.jsonl", [{"sentence1": f"one {i}", "sentence2": f"two {i}", "label": 1,
                                       "split": None} for i in range(40)])
    collection(root / "qa", [{"id": "1", "text": "judged?", "split": None},
                             {"id": "2", "text": "answered?", "answers": ["yes"]}],
               [{"id": "p", "text": "passage"}], [("1", "p")])
    write(root / "news" / "docs.jsonl", [{"id": 0, "doc": "d"}])
    write(root / "news" / "s.jsonl", [{"id": i, "lang": lang, "text": f"{lang} {i}"}
                                      for i in range(9) for lang in ("en", "fr")])
    files = sets.build(root, tmp_path / "out")
    asked = {row["query"] for row in files["retrieval"]}
    assert {"q0", "q1", "judged?"} <= asked and not {"q2", "answered?"} & asked
    texts = {row["text"] for row in files["text"]}
    assert "answered?" in texts and 20 < len(texts & {f"one {i}" for i in range(40)}) < 40


def test_a_folder_appears_whole_and_replaces_none(root, tmp_path):
    out = tmp_path / "sets"
    (root / "zz").mkdir()
    (root / "zz" / "x.jsonl").write_text("{")
    with pytest.raises(ValueError, match="x.jsonl:1"):
        sets.build(root, out)
    assert not out.exists()
    write(out / "pairs" / "mine.jsonl", [{"query": "a", "pos": "b"}])
    with pytest.raises(ValueError, match="sets is there already; delete it, or choose another"):
        sets.build(root, out)


def test_stage_4_takes_some_rows_of_a_set_and_stage_3_all(tmp_path):
    write(tmp_path / "root" / "asked" / "x.jsonl",
          [{"query": f"q{i}", "pos": "p"} for i in range(600)])
    write(tmp_path / "root" / "topics" / "x.jsonl",
          [{"text": f"text {i}", "label": f"l{i % 20}"} for i in range(40)])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    assert len(files["retrieval"]) == sets.SUPERVISED == 500 and len(files["pairs/asked"]) == 600
    assert {len(set(row["neg"])) for row in files["classification"]} == {15}


def test_what_a_document_is_asked_by(tmp_path):
    """Its title or its keywords, in each language; a title that says all of it teaches nothing."""
    root = tmp_path / "root"
    write(root / "pages" / "x.jsonl", [
        *({"id": 1, "lang": lang, "title": f"{lang} title", "text": lang * 1000}
          for lang in ("en", "ko")), {"id": 2, "title": "same", "text": "same"}])
    write(root / "words" / "x.jsonl", [{"text": "a text", "keywords": ["one", "two"]},
                                       {"text": "other text", "keywords": "three"}])
    files = sets.build(root, tmp_path / "sets")
    asked = {kind: {(row["query"], *row["pos"]) for row in files[kind]}
             for kind in ("retrieval", "clr")}
    assert asked == {"retrieval": {("en title", "en" * 600), ("ko title", "ko" * 600),
                                   ("one two", "a text"), ("three", "other text")},
                     "clr": {("en title", "ko" * 600), ("ko title", "en" * 600)}}


def test_a_crop_is_no_part_of_its_passage(tmp_path):
    write(tmp_path / "root" / "plain" / "x.jsonl", [
        {"text": f"The first is {i}.5. It is so. The third one is v{i}.", "lang": "en"}
        for i in range(9)])
    rows = sets.build(tmp_path / "root", tmp_path / "sets")["pairs/others"]
    assert len(rows) == 9 and all(row["query"] not in row["pos"][0] for row in rows)
    assert {row["query"][:9] for row in rows} <= {"The first", "The third"}    # sentences, not "5."
    assert all(row["query"].endswith((".5.", *(f"v{i}." for i in range(9)))) for row in rows)


def test_a_long_text_gives_a_crop_of_each_part(tmp_path):
    write(tmp_path / "root" / "plain" / "x.jsonl", [
        {"text": "This is the first. That is the second. " * 60, "lang": "en"}])       # 2,340
    assert len(sets.build(tmp_path / "root", tmp_path / "sets")["pairs/others"]) == 2


def test_only_what_means_the_same_is_a_pair(tmp_path):
    write(tmp_path / "root" / "same" / "x.jsonl", [
        {"sentence1": f"one {i}", "sentence2": f"two {i}", "label": i % 2} for i in range(40)])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    rows = files["pairs/others"]
    assert not any("two" in row["text"] for row in files["text"])      # one language: no document
    assert rows and all(int(row["query"].split()[1]) % 2 for row in rows)
    assert {row["query"].split()[0] for row in rows} == {"one", "two"}     # both directions


def test_a_held_out_paraphrase_is_held_out_in_every_language(tmp_path):
    write(tmp_path / "root" / "same" / "x.jsonl", [
        {"id": i, "lang": lang, "sentence1": f"{lang} {i}", "sentence2": f"{lang} b{i}",
         "label": 1}
        for i in range(40) for lang in ("de", "en")])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    held = {row["id"] for row in read_jsonl(tmp_path / "sets/held_out/same/x.jsonl")}
    assert held and {int(row["text"].split()[1]) for row in files["text"]} == {*range(40)} - held


def test_no_sentence_of_a_held_out_paraphrase_is_trained_on(tmp_path):
    """Pairs share sentences: sentence 2 of one is sentence 1 or 2 of another."""
    write(tmp_path / "root" / "same" / "x.jsonl", [
        {"sentence1": f"text {i}", "sentence2": f"text {i + step}", "label": 1}
        for i in range(0, 200, 2) for step in (1, 3)])
    files = sets.build(tmp_path / "root", tmp_path / "sets")
    held = {row[key] for row in read_jsonl(tmp_path / "sets/held_out/same/x.jsonl")
            for key in ("sentence1", "sentence2")}
    read = {row["text"] for row in files["text"]}
    read |= {text for row in files["pairs/others"] for text in (row["query"], *row["pos"])}
    assert held and read and not held & read


def test_scored_pairs_cross_languages(built):
    assert {("en a", "en b"), ("ja a", "ja b"), ("en a", "ja b"), ("ja a", "en b")} == {
        (row["sentence1"], row["sentence2"]) for row in built["sts/sim"]}


@pytest.mark.parametrize("row", [
    {"sentence1": "a", "sentence2": "b", "score": 1, "id": [1]},
    {"text": "a", "keywords": "b", "id": {}}, {"id": 1, "lang": "de", "text": "a", "label": ["b"]}])
def test_an_id_or_a_label_that_is_a_list_is_named(tmp_path, row):
    write(tmp_path / "root" / "odd" / "x.jsonl", [row | {"id": 7, "label": 0}, row])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: key '(id|label)' must be str or int, not"):
        sets.build(tmp_path / "root", tmp_path / "out")


def test_a_score_beyond_float32_is_named(tmp_path):
    folder = tmp_path / "root" / "sim"
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1e999}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: key 'score' must be a finite number"):
        sets.build(tmp_path / "root", tmp_path / "out")


@pytest.mark.parametrize("row", [{"title": "France"}, {},
                                 {"sentence1": "a", "sentence2": "b", "score": 1}])
def test_an_id_that_comes_twice_in_a_language_is_named(tmp_path, row):
    """Of the paragraphs of one page the last would stay; others would be false translations."""
    write(tmp_path / "root" / "wiki" / "x.jsonl", [
        {"id": "Q1", "lang": "en", "text": text, **row} for text in ("A country.", "A capital.")])
    with pytest.raises(ValueError, match="wiki/x: id 'Q1' comes twice in 'en'"):
        sets.build(tmp_path / "root", tmp_path / "out")


@pytest.mark.parametrize("name", ["nq-test", "nq_dev", "Validation", "nq-validation"])
def test_a_file_whose_name_ends_in_a_held_out_split_trains_nothing(tmp_path, name):
    for file in ("nq-train", name):
        write(tmp_path / "root" / "one" / f"{file}.jsonl", [{"text": f"of {file}"}])
    assert sets.build(tmp_path / "root", tmp_path / "sets")["text"] == [{"text": "of nq-train"}]
