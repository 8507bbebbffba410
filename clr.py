"""CLR: cross-lingual retrieval rows by translating the query alone (PAPER Sec. 3.3, Table 7).

    rows = [{"query": "sort a list", "pos": ["Return a new sorted list."]}, ...]
    build_clr(rows, translate)         # {"query": "eine Liste sortieren", "pos": ..., "lang": "de"}

Passages stay as they are, so a query in one language has to find a text in another. Rows are
shared out to the languages of Table 7. `translate` is any callable (text, lang) -> text or None.
tools/translate.py has three of them, and the command line.
UNSPECIFIED: the paper's prompt and filter. UNSPECIFIED: English has 25 % of Table 7's "translation
pairs", but no text is translated into its own language: the other 25 languages share out the whole.
DEVIATES: the shares of Table 7 add up to 106 and are normalised here.
"""
import random
import unicodedata
from collections import Counter
from functools import cache

from engine.bm25 import split_words

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


def allot(n, shares=TABLE_7, seed=0):
    """Return n language codes in random order, their numbers exact by largest remainder.

    >>> sorted(allot(5, {"en": 1, "zh": 2}))        # the exact shares are 1.67 and 3.33
    ['en', 'en', 'zh', 'zh', 'zh']
    """
    if min(shares.values(), default=0) < 0 or not sum(shares.values()):
        raise ValueError(f"shares must not be negative, nor all zero: {shares}")
    total = sum(shares.values())
    counts = {lang: int(n * share // total) for lang, share in shares.items()}
    by_remainder = sorted(shares, key=lambda lang: -(n * shares[lang] % total))    # stable on ties
    for lang in by_remainder[:n - sum(counts.values())]:
        counts[lang] += 1
    langs = [lang for lang, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(langs)
    return langs


def build_clr(rows, translate, shares=TABLE_7, source_lang="en", gates=None):
    """Yield the rows with "query" translated, and "lang", "source_lang", "source_id" added.

    Every other key is untouched. translate: (text, lang) -> text or None; if it has a method
    `many(jobs)`, that is used: jobs in, translations out, in their order. shares: {language:
    weight}; the source language is no target. gates: a `Gates`.
    Raises ValueError, at the first row, if no other language has a share.
    """
    rows, gates = list(rows), gates or Gates()
    targets = {lang: share for lang, share in shares.items() if lang != source_lang}
    langs = allot(len(rows), targets)
    jobs = ((row["query"], lang) for row, lang in zip(rows, langs))
    many = getattr(translate, "many", None)
    texts = many(jobs) if many else (translate(*job) for job in jobs)
    for number, (row, lang, text) in enumerate(zip(rows, langs, texts, strict=True)):
        if gates(row["query"], text, lang) is None:
            yield {**row, "query": text, "lang": lang, "source_lang": source_lang,
                   "source_id": row.get("id", row.get("_id", number))}


# ---------------------------------------------------------------- quality gates

class Gates:
    """Quality gates in a row: what one drops, the next does not see. `dropped` counts the reasons.

    A gate takes (source, translation, lang), and returns a reason to drop the translation, or None.
    """

    def __init__(self, *gates):
        self.gates, self.dropped = gates, Counter()

    def __call__(self, source, text, lang):
        """Return the first reason to drop a translation, None for a good one."""
        reason = None if text and text.strip() else "no translation"
        for gate in self.gates:
            reason = reason or gate(source, text, lang)
        if reason:
            self.dropped[reason] += 1
        return reason


SCRIPTS = {  # the first word of a character's Unicode name; Latin where nothing is said
    "zh": {"CJK"}, "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"},
    "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "ar": {"ARABIC"}, "he": {"HEBREW"}, "th": {"THAI"},
    "hi": {"DEVANAGARI"}, "bn": {"BENGALI"}, "km": {"KHMER"}}


@cache
def script_of(character):
    """Return the script of a letter: "LATIN", "CJK", "ARABIC" ...; "" for what is no letter."""
    name = unicodedata.name(character, "") if character.isalpha() else ""
    return name.partition(" ")[0]


def script_share(text, lang):
    """Return the share of the letters of `text` that are in the script of `lang`.

    >>> script_share("用 numpy 排序", "zh")         # three letters of eight
    0.375
    """
    scripts = [script for script in map(script_of, text) if script]
    return sum(s in SCRIPTS.get(lang, {"LATIN"}) for s in scripts) / max(1, len(scripts))


def script_gate(least):
    """Drop translations with a smaller share of letters in the script of their language.

    Languages that are not in `LANGUAGES` are let through.
    """
    return lambda source, text, lang: (
        "script" if lang in LANGUAGES and script_share(text, lang) < least else None)


def length_gate(low, high):
    """Drop translations whose characters, per character of the source, are not in [low, high]."""
    return lambda source, text, lang: (
        None if low <= len(text) / max(1, len(source)) <= high else "length")


def line_gate(source, text, lang):
    """Drop translations of more lines than the source: a remark stands behind them."""
    return "lines" if text.strip().count("\n") > source.strip().count("\n") else None


def copy_gate(source, text, lang):
    """Drop translations without a single word that the source does not have."""
    return "copy" if set(split_words(text)) <= set(split_words(source)) else None
