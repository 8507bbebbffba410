"""A dictionary of 761 words in 26 languages, and queries put through it word by word.

    LexiconTranslator()("the determinant of a matrix", "es")         # "determinante matriz"

lexicon.tsv holds the content words of the built-in corpus's summary lines, one row a word: the 600
most frequent, and of the next ones those that most packages use. This is the oldest way of cross-
lingual retrieval, a dictionary and no grammar, and it is no translation: function words are
dropped, inflections folded, words that are not in the table stay as technical terms do, one sense
stands for all. Word order follows the language in three rules; `Phrasing` adds what people type
around and onto the words. Offline, it gives stage 1 text in many languages and stage 4 its CLR rows
(PAPER Sec. 3.3; DEVIATES from the paper's LLM, which translates). words.tsv has the English words
that order and folding turn on.
"""
import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ATTRIBUTIVE = frozenset("between for in of on".split())   # what follows describes what precedes
HEAD_FIRST = frozenset("ar es fr he it km ms pt th vi".split())   # matrix of adjacency
HEAD_LAST = frozenset("bn fi hi hu ja ko tr zh".split())          # the matrix's determinant
VERB_LAST = frozenset("bn hi ja ko tr".split())
UNSPACED = frozenset("ja km th zh".split())
FRAMED = 0.6                       # share of the texts that become a question or a request
JOINED = 0.4                       # share of the gaps between words that get a function word


def read_table(path):
    """Return the lines of a TSV file as lists of cells; ValueError by line if one lacks some."""
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}:{number}: {len(rows[0])} cells are needed, not {row}")
    return rows


@cache
def english(kind):
    """Return {word: its lemma, or itself} of a row of words.tsv, "verbs" for example."""
    words = dict(read_table(HERE / "words.tsv"))[kind].split()
    return {word: lemma or word for word, _, lemma in (pair.partition("=") for pair in words)}


def fold(word, known):
    """Return the form of `word` that is in `known`: itself, or without plural, -ed, -ing; or None.

    >>> [fold(w, {"class", "matrix", "copy", "map", "use"}) for w in
    ...  "classes matrices copied mapping using this".split()]
    ['class', 'matrix', 'copy', 'map', 'use', None]
    """
    forms = [word, english("irregular").get(word)]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        forms += [word[:-1], word[:-2], word[:-3] + "y"]
    for ending in ("ed", "ing"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            stem = word.removesuffix(ending)
            forms += [stem + "e", stem, stem[:-1] + "y" if stem.endswith("i") else None,
                      stem[:-1] if stem[-2] == stem[-1] else None]
    return next((form for form in forms if form in known), None)


class LexiconTranslator:
    """Put texts into another language word by word; the table is read once.

    path: a TSV whose header names the languages, "en" first; ValueError by line if a cell is empty.
    """

    def __init__(self, path=HERE / "lexicon.tsv"):
        header, *rows = read_table(path)
        for number, row in enumerate(rows, 2):
            if not all(cell.strip() for cell in row):
                raise ValueError(f"{path}:{number}: {len(header)} words are needed, not {row}")
        self.table = {lang: dict(zip((row[0] for row in rows), column))
                      for lang, column in zip(header, zip(*rows))}

    def __call__(self, text, lang):
        """Return the words of `text` in `lang`, in its order; ValueError for unknown languages."""
        if lang not in self.table:
            raise ValueError(f"no language {lang!r} in the lexicon: {', '.join(self.table)}")
        return join([word for word, _ in self.words(text, lang)], lang)

    def words(self, text, lang):
        """Return [(word in `lang`, was it in the table)] of the content words, in its order."""
        words = []
        for verb, others in order_phrases(split_phrases(text, self.table["en"]), lang):
            words += others + verb if lang in VERB_LAST else verb + others
        return [(self.table[lang].get(lemma, word), lemma is not None) for word, lemma in words]


class Phrasing:
    """Give bare words the look of what people type: "matriz determinante" -> "¿cómo ...?".

    phrasing.tsv has a row for each language: questions and requests around a "{}", function words
    that may stand between two words, and endings and prefixes that a word may have instead of its
    dictionary form ("ar,er=o as": a word in -ar or -er may end in -o or -as). All are drawn at
    random and rarely make good grammar. What they teach is which part of a word carries its
    meaning, and which words carry none: a query typed by a person has "матрицы" and "how do I",
    where the lexicon has "матрица" and nothing.
    """

    def __init__(self):
        rows = read_table(HERE / "phrasing.tsv")[1:]
        self.frames = {row[0]: row[1].split(" / ") for row in rows}
        self.between = {row[0]: row[2].split() for row in rows}
        self.prefixes = {row[0]: row[4].split() for row in rows}
        rules = {row[0]: [rule.split("=") for rule in row[3].split(";") if rule] for row in rows}
        self.endings = {lang: [(sorted(old.split(","), key=len, reverse=True), new.split())
                               for old, new in own] for lang, own in rules.items()}

    def inflect(self, word, lang, rng):
        """Return `word` with another ending, by the first rule that fits; most of it stays."""
        least = 1 if lang in ("ja", "ko") else 3                # characters that stay
        for old, new in self.endings[lang]:
            for ending in old:
                if word.endswith(ending) and len(word) - len(ending) >= least:
                    return word[:len(word) - len(ending)] + rng.choice(new)
        return word

    def __call__(self, words, lang, rng):
        """Return a text from [(word, may it change)], as LexiconTranslator.words gives them."""
        out, prefixes, between = [], self.prefixes[lang], self.between[lang]
        for word, changes in words:
            if out and rng.random() < JOINED:
                out.append(rng.choice(between))
            if changes:
                *first, last = word.split(" ")
                last = self.inflect(last, lang, rng) if rng.random() < 0.5 else last
                prefix = rng.choice(prefixes) if prefixes and rng.random() < 0.4 else ""
                word = prefix + " ".join([*first, last])
            out.append(word)
        text = join(out, lang)
        if rng.random() < FRAMED:
            text = rng.choice(self.frames[lang]).replace("{}", text)
        if rng.random() < 0.5:
            start = next((i for i, c in enumerate(text) if c.isalpha()), 0)
            text = text[:start] + text[start:start + 1].upper() + text[start + 1:]
        return text


def join(words, lang):
    """Join words, by spaces where the language has them; Latin words keep theirs everywhere."""
    if lang not in UNSPACED:
        return " ".join(words)
    joined = ""
    for word in words:
        foreign = joined and (joined[-1].isascii() or word[0].isascii())
        joined += " " + word if foreign else word
    return joined


def split_phrases(text, known):
    """Return phrases (does it describe the one before, [verb], [other words]).

    A word is (as it was, its form in `known` or None); the verb is one that opens its phrase.

    >>> split_phrases("Find roots of a polynomial.", {"find", "root"})
    [(False, [('Find', 'find')], [('roots', 'root')]), (True, [], [('polynomial', None)])]
    """
    phrases = [(False, [], [])]
    for token in re.findall(r"[^\s,;:()\[\]\"]+|[,;:]", text.removeprefix("A ")):
        word = token.strip("`~'!?").rstrip(".`'").removesuffix("'s")
        for part in word.split("-") if word.replace("-", "").isalpha() else [word]:
            plain = part.lower() if part[1:].islower() else part      # "Sum", not "SUM" nor "A"
            _, verb, others = phrases[-1]
            if plain in english("phrase_ends") or token in ",;:":
                if verb or others:
                    phrases.append((plain in ATTRIBUTIVE, [], []))
            elif plain not in english("function") and any(map(str.isalnum, plain)):
                lemma = fold(plain, known) if plain.isalpha() else None
                opens = lemma in english("verbs") and not verb and not others
                (verb if opens else others).append((part, lemma))
    return phrases


def order_phrases(phrases, lang):
    """Return [[verb], [other words]] lists, each in the order that `lang` asks for."""
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
