"""Weak pairs that any documentation gives (PAPER Table 10: the weak stage reads (title, content)).

    sentence    a sentence of a document -> the rest of that document
    name        the last parts of a qualified name, as words -> its summary and body
    parameter   a parameter's name and its function's summary -> the parameter's description

Rows of documents are {"name", "text", "summary", "body"}, as corpus.py makes them. Every function
yields {"query", "pos", "name"}. `banned` holds the keys (`key_of`) of held-out texts and of their
sentences: no query and no passage is one of them.
"""
import random
import re

import regex

MAX_CHARS = 2000                   # of a passage: more than any passage_len here reads
SENTENCES = 2                      # sentences of a document that become queries, at most
GAP, ASCII_GAP = regex.compile(r"[^\p{L}\p{M}\p{N}_]+"), re.compile(r"[^A-Za-z0-9_]+")
SENTENCE = regex.compile(r"(?<=[.!?])\s+(?=[A-Z`\"])|\n\s*\n")
PROSE = regex.compile(r"[A-Z`][\w\s,;:'`\"()/.*=<>+-]{38,240}[.!?:]", regex.DOTALL)
WORD = regex.compile(r"\p{Lu}+(?!\p{Ll})|\p{Lu}?\p{Ll}+|\d+")      # HTTP|Server, read|csv
NUMPY = regex.compile(r"^Parameters\n[-=]{3,}\n(.*?)(?=^\S[^\n]*\n[-=]{3,}$|\Z)",
                      regex.M | regex.DOTALL)
NUMPY_ITEM = regex.compile(r"^\*{0,2}(\w+)(?: ?:.*)?\n((?:[ \t]+\S.*(?:\n|\Z))+)", regex.M)
GOOGLE = regex.compile(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+\S.*(?:\n|\Z)|\n)+)", regex.M)
GOOGLE_ITEM = regex.compile(r"^([ \t]+)\*{0,2}(\w+)(?: ?\([^\n]*?\))?: (.*(?:\n\1[ \t]+\S.*)*)",
                            regex.M)


def key_of(text):
    """Return a text without case, spacing and punctuation: equal keys say the same."""
    gaps = ASCII_GAP if text.isascii() else GAP        # the former is faster
    return gaps.sub(" ", text).strip().lower()


def sentences_of(text):
    """Return the prose sentences of a text: 40 to 240 characters, most of them letters.

    >>> sentences_of("Sort it. The sort is stable: equal items keep their order.\\n\\n>>> f()")
    ['The sort is stable: equal items keep their order.']
    """
    parts = (part.strip() for part in SENTENCE.split(text))
    return [part for part in parts if PROSE.fullmatch(part) and
            sum(map(str.isalpha, part)) > 0.7 * len(part) and part.count(" ") >= 5]


def words_of_name(name, parts=2):
    """Return the last parts of a qualified name as words.

    >>> words_of_name("http.server.HTTPServer.handle_error"), words_of_name("os.path._getcwd")
    ('HTTP Server handle error', 'path getcwd')
    """
    return " ".join(WORD.findall(" ".join(name.split(".")[-parts:])))


def sentence_rows(rows, banned, seed=0):
    """Yield up to `SENTENCES` sentences of each document with the rest of it as the passage.

    The summary is none of them: it is the query of the documentation pairs.
    """
    rng = random.Random(seed)
    for row in rows:
        summary = key_of(row["summary"])
        good = [sentence for sentence in sentences_of(row["text"])
                if (key := key_of(sentence)) != summary and key not in banned]
        for sentence in rng.sample(good, min(SENTENCES, len(good))):
            rest = row["text"].replace(sentence, "", 1).strip()[:MAX_CHARS]
            if len(rest) >= 60 and key_of(rest) not in banned:
                yield {"query": " ".join(sentence.split()), "pos": [rest], "name": row["name"]}


def name_rows(rows, banned):
    """Yield names as words with what they stand for; names of a single word say too little."""
    for row in rows:
        query, passage = words_of_name(row["name"]), f"{row['summary']}\n{row['body']}".strip()
        if " " in query and len(passage) >= 40 and key_of(passage) not in banned:
            yield {"query": query, "pos": [passage[:MAX_CHARS]], "name": row["name"]}


def parameters_of(text):
    """Return [(name, description)] of a docstring in numpy's or Google's style.

    >>> parameters_of("Args:\\n    x (Tensor): the input,\\n        of any shape")
    [('x', 'the input, of any shape')]
    """
    items = [(name, text) for section in NUMPY.findall(text)
             for name, text in NUMPY_ITEM.findall(section)]
    items += [(name, text) for section in GOOGLE.findall(text)
              for _, name, text in GOOGLE_ITEM.findall(section)]
    return [(name, " ".join(text.split())) for name, text in items]


def parameter_rows(rows, banned):
    """Yield a parameter's name and function with its description; each description once."""
    seen = set(banned)
    for row in rows:
        for name, description in parameters_of(row["text"]):
            key = key_of(description)
            if row["summary"] and len(description) >= 40 and key not in seen:
                seen.add(key)
                yield {"query": f"{name}: {row['summary']}", "pos": [description[:MAX_CHARS]],
                       "name": row["name"]}
