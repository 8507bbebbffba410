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
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from tqdm import tqdm

from configurator import load_config
from data import read_jsonl

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


# ---------------------------------------------------------------- translator: the lexicon

FUNCTION_WORDS = frozenset("""
I a about above according across after against all along also although always am an and any are around
as at be because been before being below between both but by can could did do does doing during each
either else etc even every few for from given had has have having he here how however i if in into is
it its itself just like many may me might more most much must my neither no non not of off on once
one ones only onto or other otherwise our out over own per rather same she should since so some
something still such than that the their them themselves then there these they this those through
thus to too toward towards under until up upon us very via was we were what when where whereas
whether which while who whose why will with within without would yet you your""".split())
ATTRIBUTIVE = frozenset("between for in of on".split())   # what follows describes what precedes
PHRASE_ENDS = frozenset("""and as at before after by from if into or per so than that through to
using via when where whether which while with without within""".split()) | ATTRIBUTIVE
VERBS = frozenset("""
add allocate allow append apply attach broadcast build calculate call cancel change check close
collect combine compare compile complete compose compress compute concatenate construct contain
control convert copy correspond count create decode decompress define delete depend describe
determine disable dispatch display distribute divide download draw enable encode encrypt estimate
evaluate exclude execute exist exit expand export extend extract fail fill find fix flatten follow
fuse gather generate get give handle hold ignore implement import include indicate initialize insert
install integrate interpolate iterate join keep learn load look make measure merge modify move
multiply need normalize open override pad parse pass perform prepare print produce provide quantize
raise reach read receive reduce release remove repeat replace represent require reset restore
retrieve return reverse rewrite rotate round run save search see select send share shift show
simplify skip solve sort specify split start stop store subtract support swap take test track
transform translate transpose truncate try update use validate verify wait work wrap write""".split())
IRREGULAR = {"axes": "axis", "built": "build", "children": "child", "found": "find", "got": "get",
             "held": "hold", "indices": "index", "kept": "keep", "leaves": "leaf", "made": "make",
             "matrices": "matrix", "sent": "send", "taken": "take", "using": "use",
             "vertices": "vertex", "written": "write"}
HEAD_FIRST = frozenset("ar es fr he it km ms pt th vi".split())   # matrix of adjacency
HEAD_LAST = frozenset("bn fi hi hu ja ko tr zh".split())          # the matrix's determinant
VERB_LAST = frozenset("bn hi ja ko tr".split())
UNSPACED = frozenset("ja km th zh".split())


def fold(word, known):
    """Return the form of `word` that is in `known`: itself, or without plural, -ed, -ing; or None.

    >>> [fold(w, {"class", "matrix", "copy", "map", "use"}) for w in
    ...  "classes matrices copied mapping using this".split()]
    ['class', 'matrix', 'copy', 'map', 'use', None]
    """
    forms = [word, IRREGULAR.get(word)]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        forms += [word[:-1], word[:-2], word[:-3] + "y"]
    for ending in ("ed", "ing"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            stem = word.removesuffix(ending)
            forms += [stem + "e", stem, stem[:-1] + "y" if stem.endswith("i") else None,
                      stem[:-1] if stem[-2] == stem[-1] else None]
    return next((form for form in forms if form in known), None)


class LexiconTranslator:
    """Translate word by word: classic dictionary-based cross-lingual retrieval, no translation.

    Function words are dropped, inflections folded, and words that are not in the table stay, as
    technical terms do. Word order follows the language in three rules: heads first or last, verb
    last, no spaces. path: a TSV whose header names the languages, "en" first.
    """

    def __init__(self, path=Path(__file__).with_name("lexicon.tsv")):
        with open(path, encoding="utf-8") as file:
            header, *rows = [line.rstrip("\r\n").split("\t") for line in file]
        for number, row in enumerate(rows, 2):
            if len(row) != len(header) or not all(cell.strip() for cell in row):
                raise ValueError(f"{path}:{number}: {len(header)} cells with text are needed, not "
                                 f"{row}")
        self.table = {lang: dict(zip((row[0] for row in rows), column))
                      for lang, column in zip(header, zip(*rows))}

    def __call__(self, text, lang):
        """Return the words of `text` in `lang`, in its order; ValueError for unknown languages."""
        if lang not in self.table:
            raise ValueError(f"no language {lang!r} in the lexicon: {', '.join(self.table)}")
        words = [word for verb, nouns in order_phrases(split_phrases(text, self.table["en"]), lang)
                 for word in (nouns + verb if lang in VERB_LAST else verb + nouns)]
        words = [self.table[lang].get(lemma, word) for word, lemma in words]
        if lang not in UNSPACED:
            return " ".join(words)
        joined = ""
        for word in words:
            native = joined and {script_of(joined[-1]), script_of(word[0])} & {"LATIN", ""} == set()
            joined += word if native or not joined else " " + word
        return joined


def split_phrases(text, known):
    """Return [(does it describe the phrase before, [verb], [other words])]; a word is (word, lemma).

    >>> split_phrases("Computes the inverse of a matrix.", {"compute", "inverse", "matrix"})
    [(False, [('Computes', 'compute')], [('inverse', 'inverse')]), (True, [], [('matrix', 'matrix')])]
    """
    phrases = [(False, [], [])]
    for token in re.findall(r"[^\s,;:()\[\]\"]+|[,;:]", text.removeprefix("A ")):
        word = token.strip("`~'!?").rstrip(".`'")
        for part in word.split("-") if word.replace("-", "").isalpha() else [word]:
            plain = part.lower() if part[1:].islower() else part      # "Sum", not "SUM" nor "A"
            _, verb, others = phrases[-1]
            if plain in PHRASE_ENDS or token in ",;:":
                if verb or others:
                    phrases.append((plain in ATTRIBUTIVE, [], []))
            elif plain not in FUNCTION_WORDS and any(map(str.isalnum, plain)):
                lemma = fold(plain, known) if plain.isalpha() else None
                opens = lemma in VERBS and not verb and not others
                (verb if opens else others).append((part, lemma))
    return phrases


def order_phrases(phrases, lang):
    """Return [([verb], [other words])] in the order of `lang`: "of" phrases in front or behind."""
    runs = []
    for describes, verb, others in phrases:
        others = others[::-1] if lang in HEAD_FIRST else others
        if runs and describes and not verb:
            before = runs[-1][1]
            runs[-1][1] = others + before if lang in HEAD_LAST else before + others
        elif runs and not verb and lang in VERB_LAST:
            runs[-1][1] = runs[-1][1] + others                        # the verb waits for them
        else:
            runs.append([verb, others])
    return runs


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
        self.known, self.failed_in_a_row, self.refused = {}, 0, None
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
        return hashlib.sha256("\0".join((self.model, PROMPT, lang, text)).encode()).hexdigest()[:32]

    def many(self, jobs):
        """Yield the translation of each (text, lang), in order; a text asked twice is sent once."""
        pool, window, asked = ThreadPoolExecutor(self.in_flight), deque(), WeakValueDictionary()
        try:
            for job in jobs:
                if (future := asked.get(job)) is None:
                    asked[job] = future = pool.submit(self, *job)
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
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
                reason = error
