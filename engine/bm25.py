"""BM25: the lexical baseline to beat, and an option of tools/mine.py for small sets.

    score(q, d) = sum over words w of q of   idf(w) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(w)      = log(1 + (N - df + 1/2) / (df + 1/2))

This is the variant of today's Lucene: the idf is never negative, and the classic constant factor
(k1 + 1), which changes no ranking, is left out. k1 and b are its defaults too.
A word is a run of letters, marks and digits, in NFC and lower case: `np.linalg_norm` has three.
Scripts written without spaces, and Hangul, become overlapping pairs of characters instead.
The paper does not use BM25; its Sec. 3.4 mines candidates with an embedder.

    from engine.bm25 import BM25
    indices, scores = BM25(["a cat", "a dog"]).top_k(["dogs and a dog"], k=1)    # [[1]]
"""
import unicodedata
from array import array
from collections import Counter

import numpy as np
import regex
import torch

from engine.mining import top

K1, B = 1.2, 0.75
# Thai, Lao, Tibetan, Burmese, Khmer; Hangul (words carry endings: pairs find the stem); kana, Han.
NO_SPACES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\uac00-\ud7af"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff")
# Marks (\p{M}) are vowel signs and accents: without them Hindi words fall to pieces.
WORD = regex.compile(rf"(?P<run>(?:(?=[\p{{L}}\p{{M}}\p{{N}}])[{NO_SPACES}])+)"
                     rf"|(?:(?![{NO_SPACES}])[\p{{L}}\p{{N}}]\p{{M}}*)+")


def split_words(text):
    """Split a text of any script into the words that BM25 counts, composed or not (NFC).

    >>> split_words("torch.nn.Conv2d pads_with zéros")
    ['torch', 'nn', 'conv2d', 'pads', 'with', 'zéros']
    >>> split_words("東京都の cat")
    ['東京', '京都', '都の', 'cat']
    """
    words = []
    for match in WORD.finditer(unicodedata.normalize("NFC", text).lower()):
        word = match.group()
        if match.lastgroup == "run" and len(word) > 1:
            words.extend(word[i:i + 2] for i in range(len(word) - 1))
        else:
            words.append(word)
    return words


class BM25:
    """Index documents for BM25 search: one list of (document, impact) per word, nothing N x N.

    documents: N strings; a document without words is never found.
    """

    def __init__(self, documents):
        self.vocabulary, tokens, lengths = {}, array("i"), array("i")
        for document in documents:
            words = split_words(document)
            for word in words:
                tokens.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
            lengths.append(len(words))
        self.n_documents, n_words = len(lengths), len(self.vocabulary)

        lengths = np.asarray(lengths, dtype=np.int64)
        owner = np.repeat(np.arange(self.n_documents), lengths)         # the document of each token
        keys = np.asarray(tokens, dtype=np.int64) * self.n_documents + owner
        keys, frequency = np.unique(keys, return_counts=True)           # by word, then by document
        word, document = np.divmod(keys, max(self.n_documents, 1))
        df = np.bincount(word, minlength=n_words)
        idf = np.log1p((self.n_documents - df + 0.5) / (df + 0.5))
        mean_length = lengths.mean() if keys.size else 1.0
        damping = K1 * (1 - B + B * lengths / mean_length)
        self._starts = np.concatenate([[0], np.cumsum(df)]).tolist()
        self._documents = document.astype(np.int32)
        self._impacts = (idf[word] * frequency / (frequency + damping[document])).astype(np.float32)

    def scores(self, query):
        """Score every document against one query -> (N,) float32; 0 where no word is shared.

        A word that the query repeats counts each time.
        """
        scores = np.zeros(self.n_documents, dtype=np.float32)
        for word, count in Counter(split_words(query)).items():
            index = self.vocabulary.get(word)
            if index is not None:
                postings = slice(self._starts[index], self._starts[index + 1])
                # A document occurs once in a word's list, so += on an index array loses nothing.
                scores[self._documents[postings]] += count * self._impacts[postings]
        return scores

    def top_k(self, queries, k):
        """Rank the documents of each query -> indices (Q, min(k, N)) int64, scores float32.

        Best first; equal scores, those of documents without a shared word (0.0) included, go by
        lower index, so the result is a pure function of the documents and the queries.
        """
        k = max(0, min(k, self.n_documents))
        indices = np.zeros((len(queries), k), dtype=np.int64)
        best = np.zeros((len(queries), k), dtype=np.float32)
        for row, query in enumerate(queries if k else ()):
            values, columns = top(torch.from_numpy(self.scores(query))[None], k)
            indices[row], best[row] = columns[0], values[0]
        return indices, best
