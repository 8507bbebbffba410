"""CLR: exact allotment, untouched passages, gates by hand, a real HTTP server that misbehaves."""

import doctest
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import clr
from clr import (
    LANGUAGES,
    TABLE_7,
    ClrConfig,
    EndpointTranslator,
    TableTranslator,
    allot,
    build_clr,
    copy_gate,
    length_gate,
    score_gate,
    script_gate,
    script_share,
)

ROWS = [{"id": f"d{i}", "query": f"question {i}", "pos": [f"answer {i}"], "neg": ["x", "y"],
         "prompt": "Find it"} for i in range(300)]


def shout(text, lang):
    """A translator that is easy to check."""
    return f"{lang}: {text.upper()}"


def test_documentation_examples():
    assert doctest.testmod(clr).failed == 0


# ---------------------------------------------------------------- allotment


def test_table_7_as_printed():
    assert list(TABLE_7) == list(LANGUAGES) and len(TABLE_7) == 26
    assert sum(TABLE_7.values()) == 106  # the paper's own sum, in percent
    assert (TABLE_7["en"], TABLE_7["zh"], TABLE_7["es"], TABLE_7["km"]) == (25, 12, 8, 1)


@pytest.mark.parametrize("n", [0, 1, 7, 25, 106, 1000, 21533])
def test_counts_are_the_largest_remainder(n):
    counts = Counter(allot(n, TABLE_7, seed=3))
    assert counts.total() == n
    for lang, share in TABLE_7.items():
        assert abs(counts[lang] - n * share / 106) < 1
    if n == 106:
        assert counts == Counter(TABLE_7)


def test_largest_remainder_by_hand():
    # 10 * (0.47, 0.16, 0.37): floors 4, 1, 3; the two that are left go to .7 and .7, not to .6
    assert Counter(allot(10, {"en": 47, "zh": 16, "es": 37})) == {"en": 5, "zh": 1, "es": 4}
    assert Counter(allot(3, {"en": 1, "zh": 1, "es": 0})) == {"en": 2, "zh": 1}


def test_order_depends_on_the_seed_alone():
    assert allot(500, seed=1) == allot(500, seed=1) != allot(500, seed=2)
    code = "from clr import allot; print(allot(200, seed=5))"
    printed = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              cwd=Path(clr.__file__).parent, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout
               for seed in ("1", "2")}
    assert len(printed) == 1


@pytest.mark.parametrize("shares", [{}, {"en": 0}, {"en": 2, "zh": -1}])
def test_impossible_shares(shares):
    with pytest.raises(ValueError, match="shares"):
        allot(10, shares)


# ---------------------------------------------------------------- rows


def test_only_the_query_changes():
    made = list(build_clr(ROWS, shout, seed=1))
    assert len(made) == len(ROWS)
    for old, new in zip(ROWS, made):
        assert {k: new[k] for k in ("id", "pos", "neg", "prompt")} == {
            k: old[k] for k in ("id", "pos", "neg", "prompt")}
        assert (new["source_lang"], new["source_id"]) == ("en", old["id"])
        same = old["query"] if new["lang"] == "en" else shout(old["query"], new["lang"])
        assert new["query"] == same
    assert Counter(r["lang"] for r in made) == Counter(allot(300, seed=1))
    assert "lang" not in ROWS[0]  # the input is left as it was


def test_other_source_language_and_key():
    rows = [{"text": f"问题 {i}"} for i in range(4)]
    made = list(build_clr(rows, shout, {"en": 1, "zh": 1}, source_lang="zh", key="text"))
    assert sorted(r["lang"] for r in made) == ["en", "en", "zh", "zh"]
    assert [r["source_id"] for r in made] == [0, 1, 2, 3]  # rows without an id: their number
    assert {r["text"] for r in made if r["lang"] == "zh"} < {r["text"] for r in rows}


def test_dropped_rows_are_counted_by_reason():
    rows = [{"query": q, "pos": ["p"]} for q in ("alpha", "beta", "gamma", "delta", "none", " ")]
    table = {"alpha": "альфа", "beta": "beta", "gamma": "г" * 60, "delta": "дδέλτα", " ": " "}
    dropped = Counter()
    made = list(build_clr(rows, lambda text, lang: table.get(text), {"ru": 1}, dropped=dropped,
                          gates=[script_gate(0.5), length_gate(0.1, 4.0), copy_gate]))
    assert [r["query"] for r in made] == ["альфа"]
    assert dropped == {"script": 2, "length": 1, "no translation": 2}  # beta is Latin: "script"


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("lang, text, share", [
    ("zh", "计算矩阵的行列式", 1), ("ja", "コピーする人々", 1), ("ko", "행렬의 역행렬", 1),
    ("ar", "مصفوفة", 1), ("he", "מטריצה", 1), ("hi", "सारणिक", 1), ("bn", "নির্ণায়ক", 1),
    ("th", "ดีเทอร์มิแนนต์", 1), ("km", "ម៉ាទ្រីស", 1), ("ru", "определитель", 1),
    ("vi", "định thức", 1), ("tr", "sıralı dizi", 1), ("pl", "łańcuch", 1),
    ("ru", "det матрицы", 7 / 10), ("zh", "numpy 数组", 2 / 7), ("de", "行列", 0), ("en", "12 !", 0)])
def test_script_share(lang, text, share):
    assert script_share(text, lang) == pytest.approx(share)


def test_length_and_copies():
    gate = length_gate(0.5, 2.0)
    assert gate(["abcd"] * 4, ["a", "ab", "abcdefgh", "abcdefghi"], ["de"] * 4) == [
        "length", None, None, "length"]
    sources = ["Sort the list"] * 3
    assert copy_gate(sources, ["sort list!", "Liste sort", "the list"], ["de"] * 3) == [
        "copy", None, "copy"]


def test_score_gate_takes_any_encoder():
    class Encoder:
        vectors = {"a": (1, 0), "b": (0.6, 0.8), "c": (0.3, 0.954)}

        def encode(self, texts):
            return np.array([self.vectors[text] for text in texts])

    assert score_gate(Encoder(), 0.5)(["a", "a"], ["b", "c"], ["fr", "fr"]) == [None, "score"]


def test_table(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "sort", "lang": "de", "translation": "sortieren"}\n')
    table = TableTranslator(path)
    assert table("sort", "de") == "sortieren" and table("sort", "fr") is None
    path.write_text('{"text": "sort", "lang": "de"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*translation"):
        TableTranslator(path)


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


@contextmanager
def endpoint(behave, **options):
    with Server(behave) as server:
        options = {"backoff": 0.001, "timeout": 5.0, **options}
        yield server, EndpointTranslator(server.url, **options)


def text_of(prompt):
    return prompt.rpartition("\n\n")[2]


def jobs(n):
    return [(f"text {i}", "de") for i in range(n)]


def test_request_and_answer(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with endpoint(lambda prompt, nth: " sortiere {die} Liste\n", api_key_env="SOME_KEY",
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
        asked = jobs(30) + jobs(5)  # five are asked twice, while the first are under way
        assert list(translate.many(asked)) == [text.upper() for text, _ in asked]
    assert 3 <= server.most <= 6
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("trouble", [
    (500, b"oops"), (429, b"slow down"), (503, b""), (200, b"<html>no JSON</html>"), (200, b"{}"),
    (200, b'{"choices": []}'), (200, b'{"choices": [{"message": {"content": null}}]}'),
    (200, b'{"choices": [{"message": {"content": "  "}}]}'), (200, b"[1]"), (200, b"\xff\xfe"),
    (200, b'{"choices": [{"message": {"content": "cut"}, "finish_reason": "length"}]}'),
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


def test_text_that_never_works_has_no_translation():
    def behave(prompt, nth):
        return (500, b"") if text_of(prompt) == "text 3" else "ja"

    dropped = Counter()
    with endpoint(behave, tries=3) as (server, translate):
        rows = [{"query": text} for text, _ in jobs(6)]
        made = list(build_clr(rows, translate, {"de": 1}, dropped=dropped))
    assert [r["source_id"] for r in made] == [0, 1, 2, 4, 5] and dropped == {"no translation": 1}
    assert sorted(server.asked.values()) == [1, 1, 1, 1, 1, 3]


@pytest.mark.parametrize("behave, at_most", [
    (lambda prompt, nth: (401, b"no such key"), 4),  # at once: in_flight requests, no retries
    (lambda prompt, nth: (500, b""), 100)])
def test_gives_up_on_a_dead_server(behave, at_most):
    with endpoint(behave, tries=2, in_flight=4) as (server, translate):
        with pytest.raises(ConnectionError, match="127.0.0.1"):
            list(translate.many(jobs(500)))
    assert server.asked.total() <= at_most


def test_nobody_listens():
    with Server(lambda prompt, nth: "") as server:
        url = server.url
    with pytest.raises(ConnectionError, match="texts in a row failed"):
        list(EndpointTranslator(url, tries=1, backoff=0.001).many(jobs(100)))


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
    assert TableTranslator(journal)("text 7", "de") == "TEXT 7"  # the journal is a table too


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
        assert again == "a?b!"              # what is read from a file is UTF-8 (data.parse_line)
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


# ---------------------------------------------------------------- command line


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_command_line(tmp_path, capsys):
    write_rows(tmp_path / "in.jsonl", ROWS)
    with endpoint(lambda prompt, nth: "übersetzt " + text_of(prompt)) as (server, _):
        argv = [f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'o' / 'out.jsonl'}",
                "--translator=endpoint", f"--endpoint={server.url}", "--shares=en:1,de:2"]
        clr.main(argv)
        text = (tmp_path / "o" / "out.jsonl").read_text(encoding="utf-8")
        clr.main(argv)
        assert server.asked.total() == 200  # the second run took all from the journal
    assert (tmp_path / "o" / "out.jsonl").read_text(encoding="utf-8") == text
    made = [json.loads(line) for line in text.splitlines()]
    assert Counter(row["lang"] for row in made) == {"de": 200, "en": 100}
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"out.jsonl", "out.jsonl.journal"}
    assert "300 of 300 rows" in capsys.readouterr().out


def test_failed_run_leaves_the_old_output(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    write_rows(tmp_path / "in.jsonl", ROWS)
    with endpoint(lambda prompt, nth: (401, b"")) as (server, _):
        with pytest.raises(ConnectionError):
            clr.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={out}", "--translator=endpoint",
                      f"--endpoint={server.url}"])
    assert out.read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_bad_row_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"query": "a"}\n{"pos": ["b"]}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*query"):
        clr.main([f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("settings, message", [
    ({"translator": "endpoint"}, "--endpoint"), ({"translator": "table"}, "--table"),
    ({"source_lang": "zh"}, "lexicon"), ({"in_flight": 0}, "in_flight")])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ClrConfig(input=("a",), out="b", **settings)


def test_ctrl_c(tmp_path):
    """The program stops within a moment, says how to go on, and leaves no half-written output."""
    write_rows(tmp_path / "in.jsonl", ROWS)
    with endpoint(lambda prompt, nth: time.sleep(0.05) or "übersetzt") as (server, _):
        run = subprocess.Popen(
            [sys.executable, "clr.py", f"--input={tmp_path / 'in.jsonl'}", "--in_flight=2",
             f"--out={tmp_path / 'out.jsonl'}", "--translator=endpoint",
             f"--endpoint={server.url}"],
            cwd=Path(clr.__file__).parent, stderr=subprocess.PIPE, text=True)
        while server.asked.total() < 4:
            time.sleep(0.02)
            assert run.poll() is None
        run.send_signal(2)
        _, error = run.communicate(timeout=20)
    assert run.returncode == 130 and "journal" in error and "Traceback" not in error
    kept = (tmp_path / "out.jsonl.journal").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl.journal"}
    assert kept.endswith(b"\n") and kept.count(b"\n") == server.asked.total() < 290
