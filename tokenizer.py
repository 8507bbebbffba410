r"""Byte-level BPE, trained on our own texts and run by `tiktoken.Encoding`.

PAPER Sec. 3.1.1: the vocabulary has 150,000 entries, learned from about 400,000 documents in many
languages. Training is the textbook algorithm: start from the 256 bytes, count neighbouring pairs
inside words, make the most frequent pair a new token, repeat until the vocabulary is full.

    tokenizer = Tokenizer.train(texts, vocab_size=32_000)
    tokenizer.save("out/tokenizer.tiktoken")
    tokenizer.encode("Hello, world")            # list of ids; tokenizer.decode(ids) is the way back

UNSPECIFIED: what a word is. `PATTERN` below is the answer here, with its reasons.
UNSPECIFIED: ties. The pair of lower ids wins, so equal texts give equal tokens on every machine.
UNSPECIFIED: Unicode's two spellings of one letter. Every text is composed first (NFC).
"""
import base64
import hashlib
import heapq
import json
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

# How text is cut into words; BPE never merges across a cut. The alternatives are tried in order:
#
#   capitals, then small letters   get|Item, HTTP|_|URL, and HTTPServer in one
#   small letters
#   letters without case           Chinese, Japanese, Thai, Hindi, Arabic, Korean ...
#   up to three digits             10 + 100 + 1,000 tokens spell every number
#   punctuation and symbols        runs, so that `__` and `>>>` and an emoji can be one token
#   blank lines, then indentation  apart, so that neither multiplies the other
#
# Only a SPACE may lead a word. Other patterns let any one character lead it, and learn `_matrix`,
# `.matrix` and `(matrix` as three strangers. Marks (\p{M}: vowels of Hindi and Thai) belong to the
# letters before them. Letters with and without case never share a word: `numpy` in a Chinese
# sentence is the `numpy` of an English one.
#
# There is no look-ahead. On 26 MB of code and 200 languages the customary `\s+(?!\S)` saved no
# token and made encoding 1.3 times slower. A megabyte of spaces overflowed the encoder's stack.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{M}]", r"[\p{Ll}\p{Lm}\p{M}]"
PATTERN = "|".join([
    rf" ?{_UPPER}+{_LOWER}*",
    rf" ?{_LOWER}+",
    r" ?\p{Lo}[\p{Lo}\p{Lm}\p{M}]*",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{M}\p{N}][^\s\p{L}\p{N}]*",
    r"\s*[\r\n]+",
    r"\s+"])

# Training cuts a word after this many characters. Real words are shorter, and a run of megabytes
# would cost its length at every merge. Whitespace needs no limit: each merge halves the run.
MAX_WORD = 128

EOS, PAD = "<|endoftext|>", "<|pad|>"      # always the last two ids of the vocabulary
HEADER = "#nanoconan-bpe "         # "#" is not in the base64 alphabet: no token line begins like it


def compose(text):
    """Return a text in Unicode's NFC: an accented letter is one character, however it was typed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Tokenizer:
    """Turn text into ids and back. ranks: {token as bytes: id}, ids from 0 without gaps.

    Special tokens never come from text: "<|endoftext|>" in a document becomes several ordinary ids.
    Whoever builds a token stream puts `eos_id` between documents.
    """
    VERSION = "2"                  # of the way that texts are cut; raise it when that changes

    def __init__(self, ranks):
        self.eos_id, self.pad_id = len(ranks), len(ranks) + 1
        self.encoding = tiktoken.Encoding("nanoconan", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens={EOS: self.eos_id, PAD: self.pad_id})

    @property
    def vocab_size(self):
        """Return the number of ids, the two special tokens included."""
        return self.encoding.n_vocab

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a vocabulary of `vocab_size` ids: 256 bytes, merges, two special tokens.

        The texts are read once, as a stream; memory grows with the number of distinct words. With
        too few repeated pairs the tokenizer is smaller, and a warning says so. Raises ValueError
        for a vocabulary below 258 ids, TypeError for one str.
        """
        if vocab_size < 258:
            raise ValueError(f"vocab_size={vocab_size}: 256 bytes + 2 special tokens need 258")
        if isinstance(texts, str):
            raise TypeError("texts is one str, expected an iterable of str")
        tokens = _merge_words(_count_words(texts), vocab_size - 258)
        if len(tokens) < vocab_size - 2:
            warnings.warn(f"vocab_size={vocab_size} is more than the {len(tokens) + 2} entries "
                          "learned: no pair of tokens occurs twice any more; use more text or a "
                          "smaller vocabulary", stacklevel=2)
        return cls({token: rank for rank, token in enumerate(tokens)})

    def encode(self, text):
        """Turn a text into a list of ids. A lone surrogate, no UTF-8, counts as U+FFFD."""
        return self.encoding.encode_ordinary(compose(text))

    def encode_batch(self, texts):
        """Encode many texts, long ones on all cores; equal to `encode` of each."""
        if sum(map(len, texts)) < 1000 * len(texts):       # threads pay for long texts only
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(list(map(compose, texts)),
                                                   num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        """Turn ids into text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.encoding.decode([int(index) for index in ids])

    def tokens(self):
        """Return the bytes of every ordinary token, in the order of ids."""
        return [self.encoding.decode_single_token_bytes(rank) for rank in range(self.eos_id)]

    def to_bytes(self):
        """Return what `save` writes: a header line, then tiktoken's rank format.

        The header carries the number of tokens and the pattern, without which ranks mean nothing.
        Other programs read the file after dropping its first line.
        """
        lines = [HEADER + json.dumps({"tokens": self.eos_id, "pattern": PATTERN})]
        lines += [_token_line(token, rank) for rank, token in enumerate(self.tokens())]
        return ("\n".join(lines) + "\n").encode("ascii")

    def fingerprint(self):
        """Return the SHA-256 of what `save` writes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path):
        """Write one text file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. Raises ValueError naming file and line when it is damaged."""
        ranks = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            n_tokens = _parse_header(file.readline(), f"{path}:1")
            for line in map(str.strip, file):
                try:
                    token = base64.b64decode(line.partition(" ")[0])
                except ValueError:
                    token = b""
                if not token or token in ranks or line != _token_line(token, len(ranks)):
                    raise ValueError(f"{path}:{len(ranks) + 2}: expected a new token of rank "
                                     f"{len(ranks)}, found {line[:80]!r}")
                ranks[token] = len(ranks)
        n_bytes = sum(len(token) == 1 for token in ranks)
        if (len(ranks), n_bytes) != (n_tokens, 256):
            raise ValueError(f"{path}: has {len(ranks)} tokens, {n_bytes} of them single bytes; "
                             f"expected {n_tokens} and 256")
        return cls(ranks)


def _token_line(token, rank):
    return f"{base64.b64encode(token).decode()} {rank}"


def _parse_header(line, where):
    """Return the number of tokens that the header line announces."""
    try:
        header = json.loads(line.removeprefix(HEADER))
        n_tokens, pattern = header["tokens"], header["pattern"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a line {HEADER}{{...}}, not {line.strip()[:80]!r}: "
                         f"{error!r}") from error
    if pattern != PATTERN:
        raise ValueError(f"{where}: cuts words by another pattern, {str(pattern)[:40]!r}; train "
                         "the tokenizer again")
    return n_tokens


# ---------------------------------------------------------------- training

def _pieces(texts):
    """Yield the texts as `encode` will see them; one with a very long word comes word by word."""
    for text in texts:
        if not text.isascii():                 # lone surrogates; the same repair as tiktoken's
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = compose(text)
        if max(map(len, text.split()), default=0) <= MAX_WORD:
            yield text
            continue
        for word in regex.findall(PATTERN, text):
            size = len(word) if word.isspace() else MAX_WORD
            yield from (word[start:start + size] for start in range(0, len(word), size))


def _count_words(texts):
    """Count distinct words: merges look at each of them once, however often it occurs."""
    find_words, counts = regex.compile(PATTERN).findall, Counter()
    for piece in _pieces(texts):
        counts.update(find_words(piece))
    return counts


def _merge_words(counts, n_merges):
    """Run BPE on counted words; return the tokens (bytes) in the order of their ids.

    Naively every merge recounts every pair. Here a merge visits only the words that contain its
    pair (`where`) and changes only the counts beside it. The heap is lazy: an entry whose count has
    fallen since is pushed again with the true count when it comes up.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words, freqs = [list(word.encode("utf-8")) for word in counts], list(counts.values())
    pair_counts, where = defaultdict(int), defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]     # ties: the lower pair of ids
    heapq.heapify(heap)
    bar = tqdm(total=n_merges, desc="tokenizer: merges", disable=None, leave=False)
    while len(tokens) < 256 + n_merges and heap:
        negative, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative:
            if 1 < count < -negative:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:                          # a pair that occurs once is no regularity
            break
        # Never a token twice (ab+c, a+bc): merges inside a token's span do not depend on its
        # surroundings, so equal bytes that end as one token were always split in the same way.
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update()
        changes = defaultdict(int)
        for index in where.pop(pair):
            for changed, difference in _merge_word(words[index], pair, new):
                changes[changed] += difference * freqs[index]
                if difference > 0:
                    where[changed].add(index)
        for changed, difference in changes.items():
            pair_counts[changed] += difference
            if difference > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
    bar.close()
    return tokens


def _merge_word(word, pair, new):
    """Replace `pair` by `new` in one word, left to right; return [(pair, change of its count)]."""
    out, changes, i, last = [], [], 0, len(word) - 1
    while i <= last:
        if i == last or word[i] != pair[0] or word[i + 1] != pair[1]:
            out.append(word[i])
            i += 1
            continue
        changes.append((pair, -1))
        if out:
            changes += [((out[-1], pair[0]), -1), ((out[-1], new), 1)]
        i += 2
        if i <= last:
            changes += [((pair[1], word[i]), -1), ((new, word[i]), 1)]
        out.append(new)
    word[:] = out              # in place: fresh lists made the garbage collector half of the time
    return changes
