"""CLR: cross-lingual retrieval rows by translating the query alone (PAPER Sec. 3.3, Table 7).

    python clr.py --input=rows.jsonl --out=clr.jsonl                                # the lexicon
    python clr.py --input=rows.jsonl --out=clr.jsonl --translator=endpoint \\
                  --endpoint=http://localhost:8000/v1 --model=Qwen2.5-7B-Instruct --in_flight=64
    python clr.py --input=rows.jsonl --out=clr.jsonl --translator=table --table=translated.jsonl

Passages stay as they are, so a query in one language has to find a text in another. Rows are
allotted to the 26 languages by the shares of Table 7; those of the source language keep their
query. A translator is any callable (text, lang) -> str, or None where it has none.
UNSPECIFIED: the paper's prompt, its filter, and why the shares of Table 7 add up to 106: they are
normalised here. DEVIATES: the lexicon is no translation but classic dictionary-based retrieval.
"""
import hashlib
import json
import os
import random
import re
import sys
import threading
import unicodedata
import urllib.error
import urllib.request
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from tqdm import tqdm

from configurator import load_config
from data import read_jsonl
from toy.lexicon import LexiconTranslator

LANGUAGES = {
    "en": "English", "zh": "Chinese", "es": "Spanish", "fr": "French", "ja": "Japanese",
    "de": "German", "ru": "Russian", "it": "Italian", "pt": "Portuguese", "ar": "Arabic",
    "ko": "Korean", "bn": "Bengali", "da": "Danish", "sv": "Swedish", "th": "Thai", "ms": "Malay",
    "tr": "Turkish", "vi": "Vietnamese", "nl": "Dutch", "pl": "Polish", "hi": "Hindi",
    "km": "Khmer", "fi": "Finnish", "he": "Hebrew", "hu": "Hungarian", "no": "Norwegian"}
TABLE_7 = {  # in percent, as printed: the sum is 106
    "en": 25, "zh": 12, "es": 8, "fr": 6, "ja": 6, "de": 5, "ru": 5, "it": 4, "pt": 4, "ar": 3,
    "ko": 3, "bn": 2, "da": 2, "sv": 2, "th": 2, "ms": 2, "tr": 2, "vi": 2, "nl": 2, "pl": 2,
    "hi": 2, "km": 1, "fi": 1, "he": 1, "hu": 1, "no": 1}
PROMPT = ("Translate this search query into {language}. Leave names, code and formulas as they "
          "are. Answer with the translation and nothing else.\n\n{text}")


# ---------------------------------------------------------------- rows

def allot(n, shares=TABLE_7, seed=0):
    """Return n language codes in random order, their numbers exact by largest remainder.

    >>> sorted(allot(5, {"en": 1, "zh": 2}))        # 1.67 and 3.33 are asked for
    ['en', 'en', 'zh', 'zh', 'zh']
    """
    if min(shares.values(), default=0) < 0 or not sum(shares.values()):
        raise ValueError(f"shares must not be negative, nor all zero: {shares}")
    total = sum(Fraction(share) for share in shares.values())
    exact = {lang: n * Fraction(share) / total for lang, share in shares.items()}
    counts = {lang: int(quota) for lang, quota in exact.items()}
    by_remainder = sorted(exact, key=lambda lang: counts[lang] - exact[lang])  # stable on ties
    for lang in by_remainder[:n - sum(counts.values())]:
        counts[lang] += 1
    langs = [lang for lang, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(langs)
    return langs


def build_clr(rows, translate, shares=TABLE_7, seed=0, source_lang="en", key="query", gates=(),
              dropped=None, progress=lambda pairs: pairs):
    """Yield the rows with `key` translated, and "lang", "source_lang", "source_id" added.

    Every other key, the passages above all, is untouched. translate: (text, lang) -> str or None;
    if it has a method `many(jobs)`, that is used: jobs in, translations out, in their order.
    gates: callables (sources, translations, langs) -> a reason to drop each, or None.
    dropped: a Counter that receives the reasons. progress: wraps the iterator over rows.
    """
    rows, dropped = list(rows), Counter() if dropped is None else dropped
    langs = allot(len(rows), shares, seed)
    jobs = ((row[key], lang) for row, lang in zip(rows, langs) if lang != source_lang)
    many = getattr(translate, "many", None)
    texts = many(jobs) if many else (translate(*job) for job in jobs)
    numbered = progress(zip(range(len(rows)), rows, langs))
    while batch := list(islice(numbered, 256)):
        made = [row[key] if lang == source_lang else next(texts) for _, row, lang in batch]
        asked = [i for i, (_, _, lang) in enumerate(batch) if lang != source_lang]
        reasons = {i: "no translation" for i in asked if not (made[i] or "").strip()}
        for gate in gates:
            left = [i for i in asked if i not in reasons]
            found = gate([batch[i][1][key] for i in left], [made[i] for i in left],
                         [batch[i][2] for i in left]) if left else []
            reasons.update((i, reason) for i, reason in zip(left, found) if reason)
        dropped.update(reasons.values())
        for i, (number, row, lang) in enumerate(batch):
            if i not in reasons:
                source_id = row.get("id", row.get("_id", number))
                yield {**row, key: made[i], "lang": lang, "source_lang": source_lang,
                       "source_id": source_id}


# ---------------------------------------------------------------- quality gates

SCRIPTS = {  # the first word of a character's Unicode name; Latin where nothing is said
    "zh": {"CJK"}, "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"},
    "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "ar": {"ARABIC"}, "he": {"HEBREW"}, "th": {"THAI"},
    "hi": {"DEVANAGARI"}, "bn": {"BENGALI"}, "km": {"KHMER"}}


@lru_cache(maxsize=None)
def script_of(character):
    """Return the script of a letter: "LATIN", "CJK", "ARABIC" ...; "" for what is no letter."""
    name = unicodedata.name(character, "") if character.isalpha() else ""
    return name.partition(" ")[0]


def script_share(text, lang):
    """Return the share of the letters of `text` that are in the script of `lang`.

    >>> script_share("用 numpy 排序", "zh")         # three letters of eight
    0.375
    """
    letters = list(filter(None, map(script_of, text)))
    return sum(s in SCRIPTS.get(lang, {"LATIN"}) for s in letters) / max(1, len(letters))


def script_gate(least):
    """Drop translations with a smaller share of letters in the script of their language."""
    return lambda sources, texts, langs: [
        "script" if script_share(text, lang) < least else None for text, lang in zip(texts, langs)]


def length_gate(low, high):
    """Drop translations whose characters, per character of the source, are not in [low, high]."""
    return lambda sources, texts, langs: [
        None if low <= len(text) / max(1, len(source)) <= high else "length"
        for source, text in zip(sources, texts)]


def copy_gate(sources, texts, langs):
    """Drop translations without a single word that the source does not have."""
    def words(text):
        return set(re.findall(r"\w+", text.casefold()))
    return ["copy" if words(text) <= words(source) else None
            for source, text in zip(sources, texts)]


def score_gate(encoder, least):
    """Drop translations whose cosine with the source is smaller; encoder: any with `.encode`."""
    def gate(sources, texts, langs):
        cosines = (encoder.encode(sources) * encoder.encode(texts)).sum(1)          # (N,)
        return ["score" if cosine < least else None for cosine in cosines]
    return gate


# ---------------------------------------------------------------- translators: table and endpoint

class TableTranslator:
    """Look translations up in a JSONL of rows {"text", "lang", "translation"} made elsewhere."""

    def __init__(self, path):
        kinds = {"text": str, "lang": str, "translation": str}
        self.table = {(row["text"], row["lang"]): row["translation"]
                      for row in read_jsonl(path, kinds)}

    def __call__(self, text, lang):
        """Return the translation, None where the table has none."""
        return self.table.get((text, lang))


class EndpointTranslator:
    """Ask an OpenAI-compatible server (vLLM, Ollama, llama.cpp ...), `in_flight` texts at a time.

    Answers go to an append-only journal, which is a `TableTranslator` file too: a run that was
    killed continues where it stopped and pays for nothing twice. A text that fails `tries` times
    has no translation; after `GIVE_UP` such texts in a row, or when the server refuses the key or
    the model, ConnectionError says so. The API key is read from the environment.
    """
    GIVE_UP = 20

    def __init__(self, endpoint, model="Qwen2.5-7B-Instruct", journal=None, in_flight=16,
                 timeout=60.0, tries=5, backoff=1.0, api_key_env="OPENAI_API_KEY"):
        self.url, self.model = endpoint.rstrip("/") + "/chat/completions", model
        self.in_flight, self.timeout, self.tries, self.backoff = in_flight, timeout, tries, backoff
        self.headers = {"Content-Type": "application/json"}
        if os.environ.get(api_key_env):
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.known, self.failed_in_a_row = {}, 0
        self.lock, self.stop, self.journal = threading.Lock(), threading.Event(), None
        if journal:
            self._open(Path(journal))

    def _open(self, path):
        """Read the journal, cut off a last line that was torn by a kill, and open it to append."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.journal = open(path, "a+b")
        self.journal.seek(0)
        content = self.journal.read()
        self.journal.truncate(content.rfind(b"\n") + 1)
        for row in read_jsonl(path, {"key": str, "translation": str}):
            self.known[row["key"]] = row["translation"]

    def _key(self, text, lang):
        """Hash what decides an answer; the prompt is its own version number."""
        parts = "\0".join((self.model, PROMPT, lang, text)).encode("utf-8", "backslashreplace")
        return hashlib.sha256(parts).hexdigest()[:32]

    def many(self, jobs):
        """Yield the translation of each (text, lang), in order; a text asked twice is sent once."""
        pool, window, asked = ThreadPoolExecutor(self.in_flight), deque(), WeakValueDictionary()

        def ask(job):
            try:
                return None if self.stop.is_set() else self(*job)
            except ConnectionError:
                self.stop.set()                                  # the others need not try
                raise

        try:
            for job in jobs:
                if (future := asked.get(job)) is None:
                    asked[job] = future = pool.submit(ask, job)
                window.append(future)
                if len(window) >= 16 * self.in_flight:         # a slow answer holds up no others
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:                  # also on Ctrl-C: what is under way is paid for, so it is awaited
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            self.stop.clear()

    def __call__(self, text, lang):
        """Return the translation, from the journal if it is there; None if it cannot be had."""
        key = self._key(text, lang)
        if key in self.known:
            return self.known[key]
        for attempt in range(self.tries):
            try:
                answer = self._ask(text, lang)
                break
            except urllib.error.HTTPError as error:
                if error.code in (401, 403, 404):              # no other text will fare better
                    raise ConnectionError(f"{self.url}: {error}: {error.read(300)!r}") from None
                reason = error
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                reason = error
            delay = self.backoff * 2 ** attempt * random.uniform(0.5, 1.5)
            if attempt + 1 == self.tries or self.stop.wait(delay):
                return self._fail(text, reason)
        with self.lock:
            self.known[key], self.failed_in_a_row = answer, 0
            if self.journal:
                row = {"key": key, "text": text, "lang": lang, "translation": answer}
                self.journal.write(to_line(row))
                self.journal.flush()
        return answer

    def _ask(self, text, lang):
        """Return the answer of one request; whatever is wrong with it raises."""
        prompt = PROMPT.format(language=LANGUAGES.get(lang, lang), text=text)
        body = {"model": self.model, "temperature": 0,
                "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            choice = json.load(response)["choices"][0]
        answer = str.strip(choice["message"]["content"])
        if not answer or choice.get("finish_reason") == "length":
            raise ValueError(f"the answer is empty or cut off: {answer[:80]!r}")
        return answer

    def _fail(self, text, reason):
        with self.lock:
            self.failed_in_a_row += not self.stop.is_set()
            if self.failed_in_a_row >= self.GIVE_UP:
                raise ConnectionError(f"{self.url}: {self.failed_in_a_row} texts in a row failed, "
                                      f"the last one, {text[:80]!r}, with {reason!r}")


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class ClrConfig:
    """The settings of `python clr.py`."""
    input: tuple[str, ...]                     # JSONL(.gz) files of rows with a query
    out: str                                   # JSONL file to write
    translator: Literal["lexicon", "endpoint", "table"] = "lexicon"
    lexicon: str = "toy/lexicon.tsv"              # words by language
    table: str | None = None                   # rows {"text", "lang", "translation"}
    endpoint: str | None = None                # for example http://localhost:8000/v1
    model: str = "Qwen2.5-7B-Instruct"         # what the endpoint calls it; the paper's
    journal: str | None = None                 # the endpoint's answers; default: OUT.journal
    in_flight: int = 16                        # requests at a time
    timeout: float = 60.0                      # seconds that a request may stall
    tries: int = 5                             # requests for a text, with growing pauses between
    api_key_env: str = "OPENAI_API_KEY"        # environment variable with the API key, if any
    key: str = "query"                         # what is translated; text in a queries.jsonl
    source_lang: str = "en"                    # language of the input; its share stays as it is
    shares: dict[str, float] = field(default_factory=lambda: dict(TABLE_7))    # en:25,zh:12,...
    seed: int = 0                              # of the allotment of rows to languages
    min_script: float = 0.2                    # least share of letters in the language's script
    length_ratio: tuple[float, float] = (0.1, 4.0)     # characters, translation / source
    drop_copies: bool = True                   # drop translations without any new word
    min_score: float | None = None             # least cosine of translation and source
    scorer: str = "out/embed_sup"              # checkpoint that min_score is measured with

    def __post_init__(self):
        if self.translator != "lexicon" and getattr(self, self.translator) is None:
            raise ValueError(f"translator {self.translator!r} needs --{self.translator}=VALUE")
        if self.translator == "lexicon" and self.source_lang != "en":
            raise ValueError(f"the lexicon translates from en, not {self.source_lang!r}")
        if min(self.in_flight, self.tries, self.timeout) <= 0:
            raise ValueError(f"in_flight {self.in_flight}, tries {self.tries} and timeout "
                             f"{self.timeout} must be positive")


def make_translator(cfg):
    """Return the translator that the settings name."""
    if cfg.translator == "table":
        return TableTranslator(cfg.table)
    if cfg.translator == "endpoint":
        return EndpointTranslator(cfg.endpoint, cfg.model, cfg.journal or f"{cfg.out}.journal",
                                  cfg.in_flight, cfg.timeout, cfg.tries,
                                  api_key_env=cfg.api_key_env)
    local = Path(cfg.lexicon)
    return LexiconTranslator(local if local.is_file() else Path(__file__).with_name(cfg.lexicon))


def make_gates(cfg):
    """Return the quality gates that the settings ask for, the cheap ones first."""
    gates = [script_gate(cfg.min_script), length_gate(*cfg.length_ratio)]
    gates += [copy_gate] if cfg.drop_copies else []
    if cfg.min_score is not None:
        from embed import Embedder                  # only here: everything else needs no model
        gates.append(score_gate(Embedder(cfg.scorer), cfg.min_score))
    return gates


def to_line(row):
    """Return a row as a line of JSONL; a lone surrogate is kept as JSON's own escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def main(argv=None):
    """Translate the queries of some files; see the module docstring."""
    cfg, langs, dropped = load_config(ClrConfig, argv), Counter(), Counter()
    rows = [row for path in cfg.input for row in read_jsonl(path, {cfg.key: str})]
    made = build_clr(rows, make_translator(cfg), cfg.shares, cfg.seed, cfg.source_lang, cfg.key,
                     make_gates(cfg), dropped,
                     partial(tqdm, total=len(rows), desc="clr", unit="row", disable=None))
    part = Path(f"{cfg.out}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file, closing(made):
            for row in made:
                langs[row["lang"]] += 1
                file.write(to_line(row))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, cfg.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{cfg.out}: {langs.total():,} of {len(rows):,} rows")
    for name, counts in (("languages", langs), ("dropped", dropped)):
        print(f"{name}: " + (", ".join(f"{k} {n:,}" for k, n in counts.most_common()) or "none"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"clr.py: error: {error}")
    except KeyboardInterrupt:
        print("clr.py: stopped; the same command goes on from the journal", file=sys.stderr)
        sys.exit(130)
