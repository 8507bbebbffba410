"""Public sets: every converter on a row of the set's true schema, runs that fail, a stand-in hub.

The last part runs `tools.prepare` against tests/tools/hub.py, laid out as the hub has these sets.
"""
import builtins
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub
import pytest

from data import PARSERS
from engine.jsonl import read_jsonl
from ranks import write_lines
from tools import filters, prepare
from tools.prepare import PrepareConfig, convert, public_sets, stream

SETS = public_sets()

NEWS = {"title": "Rain in May", "text": "It rained for a week.", "domain": "example.org",
        "date": "2018-05-02 00:00:00", "description": "d", "url": "u", "image_url": "i"}
PAGE = {"id": "12", "url": "https://x", "title": "Anarchism", "text": "A political philosophy."}
ANSWER = {"type": 0, "entity": "Q545186", "text": "Dave Edmunds", "aliases": []}
NO_ANSWER = {"type": 5, "entity": "", "text": None, "aliases": []}
MKQA = ("ar da de en es fi fr he hu it ja km ko ms nl no pl pt ru sv th tr vi zh_cn zh_hk zh_tw"
        .split())
TRIPLET = {"anchor": "what is a field", "positive": "A field is a set.", "negative": "Cows."}

SCORED = {"query": "什么是域", "pos": ["域是一个集合"], "neg": ["牛"], "pos_scores": [90.7],
          "neg_scores": [80.1], "prompt": "theirs", "type": "normal"}

# set -> (a row as the hub gives it, what it becomes but for the prompt)
ROWS = {
    "stsb": ({"sentence1": "A man plays.", "sentence2": "A man is playing.", "score": 0.76},
             [{"sentence1": "A man plays.", "sentence2": "A man is playing.", "score": 0.76}]),
    "afqmc": ({"sentence1": "花呗分期", "sentence2": "花呗怎么分期", "score": 1, "idx": 0},
              [{"sentence1": "花呗分期", "sentence2": "花呗怎么分期", "score": 1.0}]),
    "mkqa": (
        {"example_id": "563260143484355911", "query": "who sings it",
         "queries": dict.fromkeys(MKQA) | {"en": "who sings it", "ru": "кто поёт", "zh_cn": "谁唱",
                                           "zh_hk": "誰唱", "zh_tw": "誰唱"},
         "answers": dict.fromkeys(MKQA, [ANSWER]) | {"en": [ANSWER, NO_ANSWER]}},
        [{"id": f"563260143484355911/{lang}", "lang": lang, "text": text,
          "answers": ["Dave Edmunds"]}
         for lang, text in (("en", "who sings it"), ("ru", "кто поёт"), ("zh", "谁唱"),
                            ("zh_hk", "誰唱"), ("zh_tw", "誰唱"))]),
    "amazon_reviews": ({"text": "Broke after a day", "label": 0},
                       [{"text": "Broke after a day", "label": 0}]),
    "cc_news": (NEWS, [{"text": "Rain in May It rained for a week."}]),
    "cc_news_pairs": (NEWS, [{"query": "Rain in May", "pos": "It rained for a week."}]),
    "wikipedia": (PAGE, [{"text": "Anarchism A political philosophy."}]),
    "wikipedia_pairs": (PAGE, [{"query": "Anarchism", "pos": "A political philosophy."}]),
    "mc4": ({"text": "Some page.", "timestamp": "2018-12-10T05:06:03Z", "url": "https://y"},
            [{"text": "Some page."}]),
}
for name in ("msmarco", "nq", "triviaqa", "hotpotqa", "fever", "squad", "dureader", "t2ranking"):
    ROWS[name] = (SCORED, [{"query": "什么是域", "pos": ["域是一个集合"], "neg": ["牛"]}])
for name in ("miracl", "mrtydi"):
    ROWS[name] = (TRIPLET, [{"query": "what is a field", "pos": "A field is a set.",
                             "neg": "Cows."}])
for year, score in ((12, 3.75), (13, 3.75), (14, 3.75), (15, 3.75), (16, 3.75), (22, 3.25)):
    ROWS[f"sts{year}"] = ({"sentence1": "a b", "sentence2": "c d", "score": score},
                          [{"sentence1": "a b", "sentence2": "c d", "score": 0.75}])
for name in ("banking77", "emotion", "imdb", "toxic", "tweets", "amazon_counterfactual",
             "massive_intent", "massive_scenario", "mtop_intent", "mtop_domain"):
    ROWS[name] = ({"text": "wake me at nine", "label": 4, "label_text": "alarm_set"},
                  [{"text": "wake me at nine", "label": "alarm_set"}])


def expected(name):
    """The rows of ROWS with the set's prompt, where it has one."""
    prompt = SETS[name].prompt
    return [row | ({"prompt": prompt} if prompt else {}) for row in ROWS[name][1]]


class FakeStream:
    """A hub with `rows`, that breaks once row `breaks_at` is reached."""

    def __init__(self, rows, breaks_at=None):
        self.rows, self.breaks_at = rows, breaks_at

    def __call__(self, entry, lang):
        return self

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.breaks_at:
                raise ConnectionError("the hub is gone")
            yield row


# ---------------------------------------------------------------- converters

def test_every_set_has_a_row_here():
    assert ROWS.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_row_becomes_what_train_reads(name):
    made = convert(SETS[name], ROWS[name][0], 0)
    assert made == expected(name)
    if SETS[name].kind in PARSERS:
        for row in made:
            PARSERS[SETS[name].kind](row)


@pytest.mark.parametrize("name", SETS)
def test_a_changed_schema_is_named(name):
    row = {f"{key}_v2": value for key, value in ROWS[name][0].items()}
    with pytest.raises(ValueError, match=rf"{SETS[name].hub}: row 7 .*_v2"):
        convert(SETS[name], row, 7)


def test_a_row_without_a_positive_is_not_written():
    for name, change in (("msmarco", {"pos": []}), ("stsb", {"sentence2": " "}),
                         ("miracl", {"positive": None}), ("imdb", {"text": " "}),
                         ("wikipedia", {"text": None})):
        assert convert(SETS[name], ROWS[name][0] | change, 0) == []


# ---------------------------------------------------------------- runs

def config(tmp_path, **keys):
    return PrepareConfig(**{"name": "nq", "out": str(tmp_path / "out"), **keys})


def question(text):
    return {"query": text, "pos": ["yes"], "neg": ["no"]}


def questions(n):
    return [question(f"question {i}") for i in range(n)]


def test_a_run_writes_data_and_report(tmp_path, monkeypatch, capsys):
    rows = [*questions(5), question("")]
    monkeypatch.setattr(prepare, "stream", FakeStream(rows))
    path = prepare.prepare(config(tmp_path))
    assert [row["query"] for row in read_jsonl(path)] == [f"question {i}" for i in range(5)]
    report = json.loads(Path(f"{path}.report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (6, 5, {"unusable": 1})
    assert report["set"]["licence"] == SETS["nq"].licence
    assert sorted(p.name for p in path.parent.iterdir()) == ["nq.jsonl", "nq.jsonl.report.json"]
    assert "licence" in capsys.readouterr().out
    prepare.prepare(config(tmp_path))                  # does not touch what is there
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("breaks_at", [0, 25])
def test_a_broken_run_leaves_nothing_and_the_next_one_is_whole(tmp_path, monkeypatch, breaks_at):
    hub = FakeStream(questions(30), breaks_at)
    monkeypatch.setattr(prepare, "stream", hub)
    with pytest.raises(ConnectionError):
        prepare.prepare(config(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []
    hub.breaks_at = None
    assert len(list(read_jsonl(prepare.prepare(config(tmp_path))))) == 30


@pytest.mark.parametrize("found, answers", [
    ([{"text": "10.0", "aliases": ["ten", "10"]}], ["10.0", "ten", "10"]),
    ([{"text": "no", "aliases": ["No"]}], []), ([{"text": "yes"}, {"text": "Yes Man"}],
                                                ["yes", "Yes Man"])])
def test_aliases_are_answers_and_yes_or_no_alone_is_none(found, answers):
    row, = prepare.from_mkqa({"example_id": 1, "queries": {"en": "q"}, "answers": {"en": found}})
    assert row["answers"] == answers


def test_limit_counts_rows_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "stream", FakeStream([ROWS["mkqa"][0]] * 4))
    path = prepare.prepare(config(tmp_path, name="mkqa", limit=6))
    assert [row["lang"] for row in read_jsonl(path)] == "en ru zh zh_hk zh_tw en".split()


def test_one_command_takes_out_what_mteb_evaluates_on(tmp_path, monkeypatch, capsys):
    """A benchmark's name holds a comma, as the command line's lists do; a file stands beside it."""
    asked, other = [], write_lines(tmp_path / "own.jsonl", [{"text": "this is question 3"}])
    task = SimpleNamespace(
        metadata=SimpleNamespace(eval_splits=["test"]), load_data=lambda: None,
        unload_data=lambda: None, dataset={"test": [{"sentence1": "The QUESTION 1!"}]})
    monkeypatch.setattr(filters, "mteb_tasks", lambda name: asked.append(name) or ([task], True))
    rows = [question(f"{start} question {i}") for i in range(5) for start in ("the", "this is")]
    monkeypatch.setattr(prepare, "stream", FakeStream(rows))
    prepare.main(["nq", f"--out={tmp_path}", f"--decontaminate=mteb:MTEB(eng, v2),{other}"])
    assert asked == ["MTEB(eng, v2)"]
    kept = {row["query"] for row in read_jsonl(tmp_path / "nq.jsonl")}
    assert {row["query"] for row in rows} - kept == {"the question 1", "this is question 3"}
    report = json.loads((tmp_path / "nq.jsonl.report.json").read_text())
    assert (report["kept"], report["dropped"]) == (8, {"overlaps an evaluation text": 2})
    assert "dropped: overlaps an evaluation text 2" in capsys.readouterr().out


# ---------------------------------------------------------------- command line

def test_the_list_names_every_set_with_licence_and_size(capsys):
    prepare.main(["--list"])
    lines = iter(capsys.readouterr().out.splitlines())
    for (name, entry), first, second in zip(SETS.items(), lines, lines, strict=True):
        assert first.split()[:2] == [name, entry.kind] and entry.hub in first
        assert second.strip() == f"{entry.size}; licence: {entry.licence}"


@pytest.mark.parametrize("argv, message", [
    (["squat"], "no set 'squat'"), (["nq", "--lang=de"], "one language"),
    (["nq", "--limit=0"], "at least 1"), ([], "--name")])
def test_wrong_arguments_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        prepare.main(argv)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(stream(SETS["nq"], None))


# ---------------------------------------------------------------- the real loader, a hub

RUN = """
import json, sys, datasets
from tools import prepare
datasets.config.USE_PARQUET_EXPORT = False               # another host, that is not there
for argv in json.loads(sys.argv[1]):
    prepare.main(argv)
"""


def packed(rows):
    """The bytes of a parquet file with these rows."""
    import datasets
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def on_hub(name, *parts):
    """The repository of a set whose files hold these rows, and what a wrong request would meet.

    That is a configuration of another set, before the right one, and a loader that is a script,
    which `datasets` refuses.
    """
    entry = SETS[name]
    config = entry.config.format(lang=entry.lang)
    files = {f"{config or 'data'}/train-{k:05}.parquet": packed(rows)
             for k, rows in enumerate(parts)}
    wanted = {config or "default": f"{config or 'data'}/train-*.parquet"}
    if config:
        files["another/train.parquet"] = packed([{"another": "set"}])
        wanted = {"another": "another/train.parquet"} | wanted
    card = "".join(f"- config_name: {one}\n  data_files:\n  - split: {entry.split}\n"
                   f"    path: {path}\n"
                   for one, path in wanted.items())
    card = {"README.md": f"---\nconfigs:\n{card}---\n".encode()}
    script = {f"{entry.hub.split('/')[1]}.py": b"raise SystemExit"}
    return {entry.hub: {"main": script, entry.revision or "main": files | card}}


def from_hub(address, home, *command):
    """Run a python command with HF_ENDPOINT=address and nothing cached."""
    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return subprocess.run([sys.executable, *command], cwd=Path(prepare.__file__).parent.parent,
                          env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.extras
def test_every_set_comes_from_where_the_hub_has_it(tmp_path):
    pytest.importorskip("datasets")
    names = {SETS[name].hub: name for name in SETS}    # one set of each repository
    repositories = {}
    for name in names.values():
        repositories |= on_hub(name, [ROWS[name][0]] * 3)
    runs = [[name, f"--out={tmp_path / 'out'}"] for name in names.values()]
    with hub.serve(repositories) as server:
        done = from_hub(server.address, tmp_path, "-c", RUN, json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names.values():
        lang = f"-{SETS[name].lang}" if SETS[name].lang else ""
        rows = list(read_jsonl(tmp_path / "out" / f"{name}{lang}.jsonl"))
        assert rows == expected(name) * 3


@pytest.mark.extras
@pytest.mark.parametrize("name, key", [("hotpotqa", "query"), ("mc4", "text")])
def test_a_run_that_lost_the_hub_between_two_files_leaves_nothing(tmp_path, name, key):
    pytest.importorskip("datasets")
    rows = [ROWS[name][0] | {key: f"this is number {i}"} for i in range(40)]
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": f"This is number {i}!"} for i in (7, 30)])

    def run():
        argv = [name, f"--out={tmp_path / 'out'}", f"--decontaminate={bad}"]
        return from_hub(server.address, tmp_path / "home", "-c", RUN, json.dumps([argv]))

    with hub.serve(on_hub(name, rows[:25], rows[25:])) as server:
        config = SETS[name].config.format(lang=SETS[name].lang)
        server.gone.add(f"{config}/train-00001.parquet")
        lost = run()
        assert lost.returncode == 1 and "cannot be read" in lost.stderr
        assert list((tmp_path / "out").iterdir()) == []
        server.gone.clear()
        again = run()
        assert again.returncode == 0, again.stderr[-3000:]
    stem = name + (f"-{SETS[name].lang}" if SETS[name].lang else "")
    report = json.loads((tmp_path / "out" / f"{stem}.jsonl.report.json").read_text())
    assert (report["read"], report["kept"]) == (40, 38)
    assert report["dropped"] == {"overlaps an evaluation text": 2}


@pytest.mark.extras
def test_where_no_hub_answers_the_command_says_so(tmp_path):
    pytest.importorskip("datasets")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = from_hub(address, tmp_path, "-m", "tools.prepare", "nq", f"--out={tmp_path / 'out'}")
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said.startswith("prepare.py: error: "), done.stderr[-3000:]
    assert f"{SETS['nq'].hub} cannot be read" in said and "HF_ENDPOINT" in said
    assert "Traceback" not in done.stderr


def test_a_language_is_asked_of_the_hub_and_named_in_the_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "stream", lambda entry, lang: asked.append(lang) or FakeStream(
        [ROWS[entry.name][0]]))
    for lang, name in (("fi", "miracl-fi.jsonl"), (None, f"miracl-{SETS['miracl'].lang}.jsonl")):
        assert prepare.prepare(config(tmp_path, name="miracl", lang=lang)).name == name
    assert asked == ["fi", SETS["miracl"].lang] and SETS["miracl"].lang != "fi"


def test_one_set_at_a_time():
    with pytest.raises(ValueError, match="one set at a time, not nq squad"):
        prepare.main(["nq", "squad", "--limit=1"])
