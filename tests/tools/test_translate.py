"""Translators and their command line: a table, a real HTTP server that misbehaves, the journal."""
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError

import pytest

from clr import Gates, build_clr
from ranks import write_lines
from tools import translate as module
from tools.translate import EndpointTranslator, TranslateConfig, table_translator

ROOT = Path(module.__file__).parent.parent
ROWS = [{"id": f"d{i}", "query": f"question {i}", "pos": [f"answer {i}"], "neg": ["x", "y"],
         "prompt": "Find it"} for i in range(300)]


def test_table(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "sort", "lang": "de", "translation": "sortieren"}\n')
    table = table_translator(path)
    assert table("sort", "de") == "sortieren" and table("sort", "fr") is None
    path.write_text('{"text": "sort", "lang": "de"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*translation"):
        table_translator(path)


# ---------------------------------------------------------------- endpoint


class Server:
    """An OpenAI-compatible server in a thread; `behave(prompt, nth time)` decides each answer.

    It returns the text to answer with, or (status, body bytes, length that is announced, if it is
    another one), or raises to hang up.
    """

    def __init__(self, behave):
        self.behave, self.asked, self.requests, self.lock = behave, Counter(), [], threading.Lock()
        self.now = self.most = 0

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with server.lock:
                    server.asked[prompt] += 1
                    server.requests.append((self.path, dict(self.headers), body))
                    server.now += 1
                    server.most = max(server.most, server.now)
                    nth = server.asked[prompt]
                try:
                    answer = server.behave(prompt, nth)
                except ConnectionError:
                    return  # hang up without a word
                finally:
                    with server.lock:
                        server.now -= 1
                if isinstance(answer, str):
                    answer = 200, json.dumps({"choices": [{"message": {"content": answer},
                                                           "finish_reason": "stop"}]}).encode()
                try:
                    self.send_response(answer[0])
                    self.send_header("Content-Length", str((*answer, len(answer[1]))[2]))
                    self.end_headers()
                    self.wfile.write(answer[1])
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args):
                pass

        class Http(ThreadingHTTPServer):
            request_queue_size, daemon_threads = 128, True

        self.http = Http(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(EndpointTranslator, "BACKOFF", 0.001)
    monkeypatch.setattr(EndpointTranslator, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")            # of a machine behind a proxy


@contextmanager
def endpoint(behave, journal=None, timeout=5.0, tries=5, **options):
    with TemporaryDirectory() as folder, Server(behave) as server:
        translate = EndpointTranslator(server.url, journal or f"{folder}/journal", **options)
        translate.TIMEOUT, translate.TRIES = timeout, tries
        yield server, translate


def text_of(prompt):
    return prompt.rpartition("\n\n")[2]


def jobs(n):
    return [(f"text {i}", "de") for i in range(n)]


def test_request_and_answer():
    with endpoint(lambda prompt, nth: " sortiere {die} Liste\n", api_key="secret",
                  model="a-model") as (server, translate):
        assert translate("sort {the} list", "de") == "sortiere {die} Liste"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "a-model" and body["temperature"] == 0
    assert "German" in body["messages"][0]["content"]
    assert text_of(body["messages"][0]["content"]) == "sort {the} list"


def test_many_keeps_order_and_stays_in_flight():
    def slow(prompt, nth):
        time.sleep(0.1 if text_of(prompt).endswith("0") else 0.02)
        return text_of(prompt).upper()

    with endpoint(slow, in_flight=6) as (server, translate):
        assert list(translate.many(jobs(30))) == [text.upper() for text, _ in jobs(30)]
        assert translate("text 7", "de") == "TEXT 7"
    assert 3 <= server.most <= 6
    assert set(server.asked.values()) == {1}           # what was answered is not asked again


@pytest.mark.parametrize("trouble", [
    (500, b"oops"), (429, b"slow down"), (503, b""), (200, b"<html>no JSON</html>"), (200, b"{}"),
    (200, b'{"choices": []}'), (200, b'{"choices": [{"message": {"content": null}}]}'),
    (200, b'{"choices": [{"message": {"content": "  "}}]}'), (200, b"[1]"), (200, b"\xff\xfe"),
    (200, b'{"choices": [{"message": {"content": "cut"}, "finish_reason": "length"}]}'),
    (200, b"[" * 100_000), (200, b'{"choices": [{"message": {"content": "<think>so</think>"}}]}'),
    (200, b"cut off", 500), "hang up", "stall"])
def test_trouble_passes(trouble):
    """Twice it goes wrong, the third time it works."""
    def behave(prompt, nth):
        if nth > 2:
            return "gut"
        if trouble == "hang up":
            raise ConnectionError
        if trouble == "stall":
            time.sleep(0.6)
        return trouble

    with endpoint(behave, timeout=0.3 if trouble == "stall" else 5.0, tries=3) as (_, translate):
        assert translate("good", "de") == "gut"


def test_a_server_says_how_long_to_wait(tmp_path, monkeypatch):
    answers = iter([HTTPError("u", 429, "", {"Retry-After": "0"}, None), "gut"])

    def ask(*_):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer
    translate = EndpointTranslator("http://x/v1", tmp_path / "j")
    monkeypatch.setattr(translate, "PAUSE", 1e9)
    monkeypatch.setattr(translate, "_ask", ask)
    assert translate("good", "de") == "gut"


def test_text_that_never_works_has_no_translation():
    def behave(prompt, nth):
        return (500, b"") if text_of(prompt) == "text 3" else "ja"

    gates = Gates()
    with endpoint(behave, tries=3) as (server, translate):
        rows = [{"query": text} for text, _ in jobs(6)]
        translated = list(build_clr(rows, translate, {"de": 1}, gates=gates))
    assert [row["source_id"] for row in translated] == [0, 1, 2, 4, 5]
    assert gates.dropped == {"no translation": 1}
    assert sorted(server.asked.values()) == [1, 1, 1, 1, 1, 3]


@pytest.mark.parametrize("code, at_most", [
    (401, 4), (403, 4), (404, 4),          # a refusal: at once, in_flight requests, no retries
    (500, 100)])
def test_gives_up_on_a_server_that_never_answers(code, at_most):
    with endpoint(lambda prompt, nth: (code, b"no"), tries=2, in_flight=4) as (server, translate):
        with pytest.raises(ConnectionError, match="127.0.0.1"):
            list(translate.many(jobs(500)))
    assert server.asked.total() <= at_most


def test_nobody_listens(tmp_path, monkeypatch):
    """That shows at once: no second request is made."""
    monkeypatch.setattr(EndpointTranslator, "BACKOFF", 1e9)
    with Server(lambda prompt, nth: "") as server:
        url = server.url
    with pytest.raises(ConnectionError, match="127.0.0.1.* refused"):
        list(EndpointTranslator(url, tmp_path / "j").many(jobs(100)))


def test_killed_run_pays_for_nothing_twice(tmp_path):
    """The server dies half-way; then the journal's last line is torn; then it goes on."""
    journal, alive = tmp_path / "sub" / "journal.jsonl", {"left": 20, "lock": threading.Lock()}

    def mortal(prompt, nth):
        with alive["lock"]:
            alive["left"] -= 1
            if alive["left"] < 0:
                raise ConnectionError
        return text_of(prompt).upper()

    with endpoint(mortal, tries=1, in_flight=4, journal=journal) as (first, translate):
        with pytest.raises(ConnectionError):
            list(translate.many(jobs(50)))
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 20
    done = {json.loads(line)["text"] for line in lines}
    journal.write_bytes(b"".join(lines) + b'{"key": "torn, as by kill -9')

    with endpoint(lambda prompt, nth: text_of(prompt).upper(), journal=journal) as (second, again):
        assert list(again.many(jobs(50))) == [text.upper() for text, _ in jobs(50)]
    asked = Counter(text_of(prompt) for prompt in second.asked)
    assert asked == Counter(text for text, _ in jobs(50) if text not in done)

    with endpoint(mortal, journal=journal) as (third, again):
        assert list(again.many(jobs(50))) == [text.upper() for text, _ in jobs(50)]
    assert not third.asked
    assert table_translator(journal)("text 7", "de") == "TEXT 7"  # the journal is a table too


def test_journal_knows_model_and_language(tmp_path):
    options = {"journal": tmp_path / "j"}
    with endpoint(lambda prompt, nth: "x", **options) as (server, one):
        other = EndpointTranslator(server.url, model="other", **options)
        assert [one("a", "de"), one("a", "fr"), one("a", "de")] == ["x"] * 3
        assert server.asked.total() == 2
        other("a", "de")
        assert server.asked.total() == 3


def test_lone_surrogate_survives(tmp_path):
    """JSON allows it, UTF-8 does not: it is asked, journalled and found again."""
    options = {"journal": tmp_path / "j"}
    with endpoint(lambda prompt, nth: text_of(prompt) + "!", **options) as (server, translate):
        assert translate("a\ud800b", "de") == "a\ud800b!"
        again = EndpointTranslator(server.url, **options)("a\ud800b", "de")
        assert again == "a?b!"              # a file is UTF-8
        assert server.asked.total() == 1


def test_damaged_journal_is_named_by_line(tmp_path):
    (tmp_path / "j").write_text('{"key": "a", "translation": "b"}\nrubbish\n')
    with pytest.raises(ValueError, match=r"j:2: not JSON"):
        EndpointTranslator("http://127.0.0.1:1", journal=tmp_path / "j")


def test_stopping_half_way_leaves_no_work_behind():
    with endpoint(lambda prompt, nth: time.sleep(0.02) or "x", in_flight=2) as (server, translate):
        answers = translate.many(jobs(200))
        next(answers)
        answers.close()  # what Ctrl-C does to it
        asked = server.asked.total()
        time.sleep(0.15)
        assert server.asked.total() == asked < 50


def test_equal_texts_in_flight_are_asked_once():
    def slow(prompt, nth):
        time.sleep(0.02)
        return text_of(prompt).upper()

    asked = [(f"text {i % 5}", lang) for i in range(100) for lang in ("de", "fr")]
    with endpoint(slow, in_flight=8) as (server, translate):
        assert list(translate.many(asked)) == [text.upper() for text, _ in asked]
    assert server.asked.total() == 10


@pytest.mark.parametrize("answer", [
    "<think>\n\n</think>\n\ngut", "<think>German?</think>gut", "It is German.\n</think>\n gut"])
def test_what_a_model_thinks_is_no_translation(answer):
    with endpoint(lambda prompt, nth: answer) as (_, translate):
        assert translate("good", "de") == "gut"


# ---------------------------------------------------------------- command line


def test_command_line(tmp_path, capsys):
    write_lines(tmp_path / "in.jsonl", ROWS)
    with endpoint(lambda prompt, nth: "übersetzt " + text_of(prompt)) as (server, _):
        argv = [f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'o' / 'out.jsonl'}",
                "--translator=endpoint", f"--endpoint={server.url}", "--shares=en:9,fr:1,de:2"]
        module.main(argv)
        text = (tmp_path / "o" / "out.jsonl").read_text(encoding="utf-8")
        module.main(argv)
        assert server.asked.total() == 300  # the second run took all from the journal
    assert (tmp_path / "o" / "out.jsonl").read_text(encoding="utf-8") == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert Counter(row["lang"] for row in rows) == {"de": 200, "fr": 100}
    for old, new in zip(ROWS, rows):
        assert new == old | {"query": f"übersetzt {old['query']}", "lang": new["lang"],
                             "source_lang": "en", "source_id": old["id"]}
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"out.jsonl", "out.jsonl.journal"}
    assert "300 of 300 rows" in capsys.readouterr().out


def test_failed_run_leaves_the_old_output(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    write_lines(tmp_path / "in.jsonl", ROWS)
    with endpoint(lambda prompt, nth: (401, b"")) as (server, _):
        with pytest.raises(ConnectionError):
            module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={out}",
                         "--translator=endpoint", f"--endpoint={server.url}"])
    assert out.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.journal"}


def test_chinese_titles_through_a_table(tmp_path):
    """Another source language: the recipe of docs/data.md for translations."""
    write_lines(tmp_path / "in.jsonl", [{"query": f"标题{i}", "id": str(i)} for i in range(3)])
    write_lines(tmp_path / "t.jsonl", [
        {"text": f"标题{i}", "lang": "en", "translation": f"title {i}"} for i in (0, 2)])
    module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
                 "--translator=table", f"--table={tmp_path / 't.jsonl'}",
                 "--source_lang=zh", "--shares=en:1,zh:5"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["query"], row["lang"], row["source_id"]) for row in rows] == [
        ("title 0", "en", "0"), ("title 2", "en", "2")]


def test_bad_row_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"query": "a"}\n{"pos": ["b"]}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*query"):
        module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("settings, message", [
    ({"translator": "endpoint"}, "--endpoint"), ({"translator": "table"}, "--table"),
    ({"source_lang": "zh"}, "lexicon"), ({"in_flight": 0}, "in_flight"),
    ({"endpoint": "http://localhost"}, "--endpoint is for --translator=endpoint"),
    ({"translator": "endpoint", "endpoint": "localhost:8000/v1"}, "must begin with http"),
    ({"out": "a"}, "a: the input would be replaced"), ({"out": "b.gz"}, "is not packed")])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        TranslateConfig(**{"input": ("a",), "out": "b"} | settings)


def test_ctrl_c(tmp_path):
    """The program stops within a moment, says how to go on, and leaves no half-written output."""
    write_lines(tmp_path / "in.jsonl", ROWS)
    # a job in the background ignores SIGINT, and so would the process that it starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with endpoint(lambda prompt, nth: time.sleep(0.05) or "übersetzt") as (server, _):
        run = subprocess.Popen(
            [sys.executable, "-m", "tools.translate", f"--input={tmp_path / 'in.jsonl'}",
             "--in_flight=2", f"--out={tmp_path / 'out.jsonl'}", "--translator=endpoint",
             f"--endpoint={server.url}"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, before)
        while server.asked.total() < 4:
            time.sleep(0.02)
            assert run.poll() is None
        run.send_signal(2)
        _, error = run.communicate(timeout=20)
    assert run.returncode == 130 and "journal" in error and "Traceback" not in error
    kept = (tmp_path / "out.jsonl.journal").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl.journal"}
    assert kept.endswith(b"\n") and kept.count(b"\n") == server.asked.total() < 290


def test_where_nothing_is_translated_the_reason_is_said(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"query": "sort a list", "pos": ["p"]}\n')
    (tmp_path / "table.jsonl").write_text('{"text": "x", "lang": "zh", "translation": "y"}\n')
    with pytest.raises(ValueError, match="no row was translated: {'no translation': 1}"):
        module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
                     "--translator=table", f"--table={tmp_path / 'table.jsonl'}"])
    assert not (tmp_path / "out.jsonl").exists()


def test_settings_and_gates_of_the_command_line(tmp_path, capsys, monkeypatch):
    """Another script, the source itself, twenty times its length: each is dropped."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    write_lines(tmp_path / "in.jsonl", ROWS[:6])
    bad = {"question 0": "问题", "question 1": "question 1", "question 2": "ü" * 200}

    def behave(prompt, nth):
        return time.sleep(0.02) or bad.get(text_of(prompt), "übersetzt")
    with endpoint(behave) as (server, _):
        module.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
                     "--translator=endpoint", f"--endpoint={server.url}", "--shares=de:1",
                     "--model=mine", "--in_flight=1"])
    shown = capsys.readouterr().out
    assert "3 of 6 rows" in shown and "languages: de 3" in shown
    assert all(f"{reason} 1" in shown for reason in ("script", "copy", "length"))
    assert server.most == 1 and {body["model"] for *_, body in server.requests} == {"mine"}
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer secret"}


def test_without_a_key_none_is_sent():
    with endpoint(lambda prompt, nth: "x") as (server, translate):
        translate("a", "de")
    assert "Authorization" not in server.requests[0][1]


def test_failures_between_answers_do_not_add_up(monkeypatch):
    """Every second text has no answer: never `GIVE_UP` in a row."""
    monkeypatch.setattr(EndpointTranslator, "GIVE_UP", 3)

    def behave(prompt, nth):
        return (500, b"") if int(text_of(prompt).split()[1]) % 2 else "ja"
    with endpoint(behave, tries=1, in_flight=1) as (_, translate):
        assert list(translate.many(jobs(12))) == ["ja", None] * 6


def test_a_server_that_has_answered_is_given_time_to_come_back(tmp_path):
    with endpoint(lambda prompt, nth: "x", journal=tmp_path / "j") as (_, translate):
        translate("a", "de")
    with pytest.raises(ConnectionError, match=r"\d+ texts in a row failed, .* refused"):
        list(translate.many(jobs(100)))
