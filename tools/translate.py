"""Make CLR rows (clr.py) with a lexicon, a server or a table of translations.

    python -m tools.translate --input=rows.jsonl --out=clr.jsonl                  # the lexicon
    python -m tools.translate --input=rows.jsonl --out=clr.jsonl --translator=endpoint \\
        --endpoint=http://localhost:8000/v1 --model=Qwen2.5-7B-Instruct --in_flight=64
    python -m tools.translate --input=zh.jsonl --out=clr.jsonl --source_lang=zh --shares=en:1 \\
        --translator=table --table=translated.jsonl

Answers of a server go to a journal as they arrive: after a kill the same command pays for nothing
twice. docs/data.md has the recipe for Chinese and other sources.
DEVIATES: the lexicon is no translator but classic dictionary-based retrieval. UNSPECIFIED: PROMPT.
"""
import hashlib
import json
import os
import random
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import clr
from clr import LANGUAGES, TABLE_7
from configurator import load_config, run_command
from engine.jsonl import atomic, check_name, read_jsonl, to_line
from toy.lexicon import LexiconTranslator

PROMPT = ("Translate this search query into {language}. Leave names, code and formulas as they "
          "are. Answer with the translation and nothing else.\n\n{text}")
MIN_SCRIPT = 0.2                   # least share of letters in the language's script
LENGTH_RATIO = (0.1, 8.0)          # characters, translation / source; from Chinese often 5


def table_translator(path):
    """Return (text, lang) -> translation or None, by a JSONL of rows made elsewhere.

    The rows are {"text", "lang", "translation"}.
    """
    kinds = {"text": str, "lang": str, "translation": str}
    table = {(row["text"], row["lang"]): row["translation"] for row in read_jsonl(path, kinds)}
    return lambda text, lang: table.get((text, lang))


class EndpointTranslator:
    """Ask an OpenAI-compatible server (vLLM, Ollama, llama.cpp ...), `in_flight` texts at a time.

    Answers go to an append-only journal, which is a table of translations, too. A text that fails
    `TRIES` times has no translation. After `GIVE_UP` such texts in a row, or when the server
    refuses the key or the model, ConnectionError says so. api_key: sent if it is not empty.
    """
    TRIES, GIVE_UP = 5, 20
    TIMEOUT = 60.0                 # seconds that a request may stall
    BACKOFF = 1.0                  # seconds before the second request for a text, doubled each time
    PAUSE = 20.0                   # seconds at least, after too many requests

    def __init__(self, endpoint, journal, model="Qwen2.5-7B-Instruct", in_flight=16, api_key=""):
        self.url, self.model = endpoint.rstrip("/") + "/chat/completions", model
        self.in_flight, self.headers = in_flight, {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.lock, self.stop, self.failed_in_a_row = threading.Lock(), threading.Event(), 0
        Path(journal).parent.mkdir(parents=True, exist_ok=True)
        self.journal = open(journal, "a+b")
        self.journal.seek(0)
        self.journal.truncate(self.journal.read().rfind(b"\n") + 1)      # a kill tore the last line
        self.known = {row["key"]: row["translation"]
                      for row in read_jsonl(journal, {"key": str, "translation": str})}

    def _key(self, text, lang):
        """Hash what decides an answer; the prompt is its own version number."""
        parts = "\0".join((self.model, PROMPT, lang, text)).encode("utf-8", "backslashreplace")
        return hashlib.sha256(parts).hexdigest()[:32]

    def many(self, jobs):
        """Yield the translation of each (text, lang), in order."""
        def ask(job):
            try:
                return None if self.stop.is_set() else self(*job)
            except ConnectionError:
                self.stop.set()                        # the others need not try
                raise

        jobs, pool = iter(jobs), ThreadPoolExecutor(self.in_flight)
        try:
            while part := list(islice(jobs, 64 * self.in_flight)):
                answers, done = pool.map(ask, dict.fromkeys(part)), {}     # equal ones once
                for job in part:
                    if job not in done:
                        done[job] = next(answers)
                    yield done[job]
        finally:       # also on Ctrl-C: requests under way are paid for, so their answers are kept
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            self.stop.clear()

    def __call__(self, text, lang):
        """Return the translation, from the journal if it is there; None if there is no answer."""
        key = self._key(text, lang)
        if key in self.known:
            return self.known[key]
        for attempt in range(self.TRIES):
            try:
                answer = self._ask(text, lang)
                break
            except (OSError, HTTPException, ValueError, LookupError, TypeError,
                    RecursionError) as error:
                if getattr(error, "code", None) in (401, 403, 404):    # no other text fares better
                    raise ConnectionError(f"{self.url}: {error}: {error.read(300)!r}") from None
                refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
                if refused and not self.known:         # there is no server
                    raise ConnectionError(f"{self.url}: {error.reason}") from None
                reason = error
            delay = self.BACKOFF * 2 ** attempt * random.uniform(0.5, 1.5)
            if getattr(reason, "code", None) == 429:       # too many requests: it says how long
                wait = reason.headers.get("Retry-After", "")
                delay = max(delay, min(int(wait), 300) if wait.isdecimal() else self.PAUSE)
            if attempt + 1 == self.TRIES or self.stop.wait(delay):
                return self._fail(text, reason)
        with self.lock:
            self.known[key], self.failed_in_a_row = answer, 0
            self.journal.write(to_line({"key": key, "text": text, "lang": lang,
                                        "translation": answer}))
            self.journal.flush()
        return answer

    def _ask(self, text, lang):
        """Return the answer of one request, without what a model thought before it.

        Raises for a missing, empty or cut one.
        """
        prompt = PROMPT.format(language=LANGUAGES.get(lang, lang), text=text)
        body = {"model": self.model, "temperature": 0,
                "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request, timeout=self.TIMEOUT) as response:
            choice = json.load(response)["choices"][0]
        answer = str.rpartition(choice["message"]["content"], "</think>")[2].strip()
        if not answer or choice.get("finish_reason") == "length":
            raise ValueError(f"the answer is empty or cut off: {answer[:80]!r}")
        return answer

    def _fail(self, text, reason):
        """Count a text without translation; raise ConnectionError after `GIVE_UP` in a row."""
        with self.lock:
            self.failed_in_a_row += not self.stop.is_set()
            self.reason = reason
            if self.failed_in_a_row >= self.GIVE_UP:
                raise ConnectionError(f"{self.url}: {self.failed_in_a_row} texts in a row failed, "
                                      f"the last one, {text[:80]!r}, with {reason!r}")


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class TranslateConfig:
    """The settings of `python -m tools.translate`. An API key is read from OPENAI_API_KEY."""
    input: tuple[str, ...]                     # JSONL(.gz) files of rows with a query
    out: str                                   # JSONL file to write; the journal is OUT.journal
    translator: Literal["lexicon", "endpoint", "table"] = "lexicon"
    table: str | None = None                   # rows {"text", "lang", "translation"}
    endpoint: str | None = None                # for example http://localhost:8000/v1
    model: str = "Qwen2.5-7B-Instruct"         # what the endpoint calls it; the paper's
    in_flight: int = 16                        # requests at a time
    source_lang: str = "en"                    # language of the input; it is no target
    shares: dict[str, float] = field(default_factory=lambda: dict(TABLE_7))    # zh:12,es:8,...

    def __post_init__(self):
        check_name(self.out, [*self.input, *filter(None, [self.table])])
        if not (self.endpoint or "http://").startswith(("http://", "https://")):
            raise ValueError(f"endpoint {self.endpoint!r} must begin with http:// or https://")
        if self.translator != "lexicon" and getattr(self, self.translator) is None:
            raise ValueError(f"translator {self.translator!r} needs --{self.translator}=VALUE")
        if other := [name for name in ("table", "endpoint")
                     if name != self.translator and getattr(self, name) is not None]:
            raise ValueError(f"--{other[0]} is for --translator={other[0]}, but the translator is "
                             f"{self.translator!r}")
        if self.translator == "lexicon" and self.source_lang != "en":
            raise ValueError(f"the lexicon translates from en, not {self.source_lang!r}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight {self.in_flight} must be positive")


def make_translator(cfg):
    """Return the translator that the settings name."""
    if cfg.translator == "lexicon":
        return LexiconTranslator()
    if cfg.translator == "table":
        return table_translator(cfg.table)
    return EndpointTranslator(cfg.endpoint, f"{cfg.out}.journal", cfg.model, cfg.in_flight,
                              os.environ.get("OPENAI_API_KEY", ""))


def main(argv=None):
    """Translate the queries of some files; see the module docstring."""
    cfg, langs = load_config(TranslateConfig, argv), Counter()
    rows = [row for path in cfg.input for row in read_jsonl(path, {"query": str})]
    gates = clr.Gates(clr.script_gate(MIN_SCRIPT), clr.length_gate(*LENGTH_RATIO), clr.line_gate,
                      clr.copy_gate)
    translator = make_translator(cfg)
    translated = clr.build_clr(rows, translator, cfg.shares, cfg.source_lang, gates=gates)
    with closing(translated), atomic(cfg.out, "wb") as file:
        for row in tqdm(translated, total=len(rows), desc="clr", unit="row", disable=None):
            langs[row["lang"]] += 1
            file.write(to_line(row))
        if rows and not langs:
            raise ValueError(f"no row was translated: {dict(gates.dropped)} "
                             f"{getattr(translator, 'reason', '')}")
    print(f"{cfg.out}: {langs.total():,} of {len(rows):,} rows")
    for name, counts in (("languages", langs), ("dropped", gates.dropped)):
        print(f"{name}: " + (", ".join(f"{k} {n:,}" for k, n in counts.most_common()) or "none"))


if __name__ == "__main__":
    try:
        run_command(main)
    except KeyboardInterrupt:
        print("translate: stopped; a journal keeps what a server has answered", file=sys.stderr)
        sys.exit(130)
