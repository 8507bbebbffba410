r"""Byte-level BPE, trained on our own texts and held by `tiktoken.Encoding`.

PAPER Sec. 3.1.1: the vocabulary is learned from about 400k multilingual documents and has 150,000
entries. Training is the textbook algorithm: start from the 256 bytes, count neighbouring pairs
inside words, and make the most frequent pair a new token, until the vocabulary is full.

UNSPECIFIED: what a word is. `PATTERN` below is the answer here, with its reasons.
UNSPECIFIED: ties. The pair of lower ids wins, so equal texts give equal tokens on every machine.

    tokenizer = Tokenizer.train(texts, vocab_size=32_000)
    tokenizer.save("out/tokenizer.bpe")
    tokenizer.encode("Hello, world")            # list of ids; tokenizer.decode(ids) is the way back
"""

import base64
import hashlib
import binascii
import heapq
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import regex
import tiktoken
from tqdm import tqdm

# How text is cut into words; BPE never merges across a cut. The alternatives are tried in order:
#
#   capitals, then small letters   get|Item, HTTP|_|URL, and HTTPServer in one
#   small letters
#   letters without case           Chinese, Japanese, Thai, Hindi, Arabic, Korean ...
#   up to three digits             numbers of any length from 1,110 tokens
#   punctuation and symbols        runs, so that `__` and `>>>` and an emoji can be one token
#   blank lines, then indentation  apart, so that neither multiplies the other
#
# Only a SPACE may lead a word. Other patterns let any one character lead it, and learn `_matrix`,
# `.matrix` and `(matrix` as three strangers; here they are punctuation + the one `matrix` that a
# query contains too. Marks (\p{M}: vowels of Hindi and Thai, accents of decomposed Latin) belong to
# the letters before them. Letters with and without case never share a word: `numpy` in a Chinese
# sentence is the `numpy` of an English one.
#
# There is no look-ahead. The customary `\s+(?!\S)` gives an indentation's last space to the word.
# Measured on 26 MB of code and 200 languages it saved no token, made encoding 1.3 times slower (the
# linear-time engine cannot be used), and a megabyte of spaces overflowed the encoder's stack.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{M}]", r"[\p{Ll}\p{Lm}\p{M}]"
PATTERN = "|".join(
    [
        rf" ?{_UPPER}+{_LOWER}*",
        rf" ?{_LOWER}+",
        r" ?\p{Lo}[\p{Lo}\p{Lm}\p{M}]*",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}][^\s\p{L}\p{N}]*",
        r"\s*[\r\n]+",
        r"\s+",
    ]
)

# Training cuts a word after this many characters. Real words are shorter; a run of megabytes would
# otherwise cost its length at every merge. Whitespace needs no limit (each merge halves the run),
# nor does encoding: tiktoken merges a word in O(n log n).
MAX_WORD = 128
_LONG_WORD = rf"[\p{{L}}\p{{M}}]{{{MAX_WORD}}}|[^\s\p{{L}}\p{{N}}]{{{MAX_WORD}}}"

EOS, PAD = "<|endoftext|>", "<|pad|>"  # always the last two ids of the vocabulary
PROBE = "Ab cD\tÉß\n日本 हिन्दी 12345 _x+=-. \u200d\x00"  # some of every kind of character
HEADER = "#nanoconan-bpe "  # "#" is not in the base64 alphabet: no token line begins like this


class Tokenizer:
    """Turn text into ids and back.

    Special tokens are never produced from text: "<|endoftext|>" in a document becomes several
    ordinary ids. `eos_id` is put between documents by whoever builds a token stream.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN):
        self.eos_id, self.pad_id = len(ranks), len(ranks) + 1
        self.pattern = pattern
        self.encoding = tiktoken.Encoding(
            "nanoconan",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={EOS: self.eos_id, PAD: self.pad_id},
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, the two special tokens included."""
        return self.encoding.n_vocab

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, backend: str = "python"
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids: 256 bytes, merges, two special tokens.

        The texts are read once, as a stream; memory grows with the number of distinct words.
        A corpus with too few repeated pairs gives a smaller tokenizer and a warning: read
        `vocab_size` from the result. `backend="rustbpe"` (pip install rustbpe) learns the same
        merges about 4 times faster, for corpora of gigabytes; where words run out it goes on with
        pairs seen once.

        Raises `ValueError` for a vocabulary below 258 ids, `TypeError` for a text that is not str.
        """
        n_merges = vocab_size - 256 - 2
        if n_merges < 0:
            raise ValueError(f"vocab_size={vocab_size}: 256 bytes + 2 special tokens need 258")
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"texts is one {type(texts).__name__}, expected an iterable of str")
        if backend == "python":
            tokens = _merge_words(_count_words(texts), n_merges)
        elif backend == "rustbpe":
            tokens = _merge_with_rustbpe(texts, n_merges)
        else:
            raise ValueError(f"backend={backend!r}: expected 'python' or 'rustbpe'")
        if len(tokens) < 256 + n_merges:
            warnings.warn(
                f"vocab_size={vocab_size} asked, {len(tokens) + 2} learned: no pair of tokens "
                "occurs twice any more; use more text or a smaller vocabulary",
                stacklevel=2,
            )
        return cls({token: rank for rank, token in enumerate(tokens)})

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts, on all cores; equal to `[encode(text) for text in texts]`."""
        if isinstance(texts, str):
            raise TypeError("texts is one str, expected a list of str")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{index}] is {type(text).__name__}, expected str")
        if sum(map(len, texts)) < 1000 * len(texts):  # handing over a short text costs more than it
            return [self.encoding.encode_ordinary(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"id {index} is outside of the vocabulary of {self.vocab_size}")
        return self.encoding.decode(ids)

    VERSION = "1"                  # of the way that texts are cut; raise it when that changes

    def to_bytes(self):
        """Return what `save` writes."""
        header = {"tokens": self.eos_id, "pattern": self.pattern}
        lines = [HEADER + json.dumps(header)]
        for rank in range(self.eos_id):
            token = self.encoding.decode_single_token_bytes(rank)
            lines.append(f"{base64.b64encode(token).decode()} {rank}")
        return ("\n".join(lines) + "\n").encode("ascii")

    def fingerprint(self):
        """Return the SHA-256 of what `save` writes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write one text file: a header line, then tiktoken's rank format.

        Ranks mean nothing without the pattern they were learned with, so the header carries it, and
        the number of tokens. Other programs read the file after dropping its first line.
        """
        header = {"tokens": self.eos_id, "pattern": self.pattern}
        partial = f"{os.fspath(path)}.{os.getpid()}.tmp"
        with open(partial, "w", encoding="ascii", newline="\n") as file:
            file.write(HEADER + json.dumps(header) + "\n")
            for rank in range(self.eos_id):
                token = self.encoding.decode_single_token_bytes(rank)
                file.write(f"{base64.b64encode(token).decode()} {rank}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote. Raises `ValueError` naming file and line when it is damaged."""
        with open(path, encoding="utf-8", errors="replace") as file:
            n_tokens, pattern = _parse_header(file.readline(), f"{path}:1")
            ranks: dict[bytes, int] = {}
            for number, line in enumerate(file, start=2):
                token = _parse_token(line, len(ranks), f"{path}:{number}")
                if token in ranks:
                    raise ValueError(f"{path}:{number}: {token!r} is already rank {ranks[token]}")
                ranks[token] = len(ranks)
        if len(ranks) != n_tokens:
            raise ValueError(f"{path}: ends after {len(ranks)} tokens, the header says {n_tokens}")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"{path}: {len(missing)} single bytes are missing, first {missing[0]}")
        try:
            tokenizer = cls(ranks, pattern)
            probe = tokenizer.decode(tokenizer.encode(PROBE))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in tiktoken's Rust is no Exception
            raise ValueError(f"{path}:1: the pattern cannot be used: {error}") from None
        if probe != PROBE:
            raise ValueError(f"{path}:1: the pattern {pattern[:80]!r} loses characters of a text")
        return tokenizer


def _parse_header(line: str, where: str) -> tuple[int, str]:
    try:
        if line.startswith(HEADER):
            header = json.loads(line[len(HEADER) :])
            regex.compile(header["pattern"])
            return int(header["tokens"]), header["pattern"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, regex.error) as error:
        raise ValueError(f"{where}: broken header {line.strip()[:80]!r}: {error}") from error
    raise ValueError(f"{where}: expected a line {HEADER}{{...}}, found {line.strip()[:40]!r}")


def _parse_token(line: str, rank: int, where: str) -> bytes:
    """Read `base64 rank`; the ranks must be 0, 1, 2 ... so that a lost line is noticed."""
    try:
        text, number = line.split()
        token = base64.b64decode(text, validate=True)
        if int(number) == rank and token:
            return token
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{where}: broken line {line.strip()[:80]!r}: {error}") from error
    raise ValueError(f"{where}: expected a token of rank {rank}, found {line.strip()[:80]!r}")


def _clean_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts as `encode` will see them, cut where a word is longer than `MAX_WORD`."""
    long_word = regex.compile(_LONG_WORD)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, expected str")
        if not text.isascii():  # lone surrogates; the same repair as tiktoken's
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        start = 0
        if max(map(len, text.split()), default=0) > MAX_WORD:  # rare, and much faster than a search
            for match in long_word.finditer(text):
                yield text[start : match.end()]
                start = match.end()
        yield text[start:]


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """Count distinct words: merges look at each of them once, however often it occurs."""
    find_words = regex.compile(PATTERN).findall
    counts: Counter[str] = Counter()
    for text in _clean_texts(texts):
        counts.update(find_words(text))
    return counts


def _merge_words(counts: Counter[str], n_merges: int) -> list[bytes]:
    """Run BPE on counted words; return the tokens in the order of their ids.

    Naively every merge recounts every pair. Here a merge visits only the words that hold its pair
    (`where`) and changes only the counts beside it. The heap is lazy: an entry whose count has
    fallen since is pushed again with the true count when it comes up.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = [list(word.encode("utf-8")) for word in counts]
    freqs = list(counts.values())
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # ties: the lower pair of ids
    heapq.heapify(heap)

    bar = tqdm(total=n_merges, desc="tokenizer: merges", disable=None, leave=False)
    while len(tokens) < 256 + n_merges and heap:
        negative, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative:
            if 1 < count < -negative:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:  # a pair seen once is no regularity
            break
        # Never a token twice (ab+c, a+bc): merges inside a token's span do not depend on its
        # surroundings, so equal bytes that end as one token were always split in the same way.
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update()
        changes: dict[tuple[int, int], int] = defaultdict(int)
        for index in where.pop(pair):
            _merge_word(words[index], pair, new, freqs[index], changes, where, index)
        for changed, difference in changes.items():
            pair_counts[changed] += difference
            if difference > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
    bar.close()
    return tokens


def _merge_word(word, pair, new, freq, changes, where, index) -> None:
    """Replace `pair` by `new` in one word, left to right; note how the pair counts change."""
    out: list[int] = []
    at, last = 0, len(word) - 1
    while at <= last:
        if at == last or word[at] != pair[0] or word[at + 1] != pair[1]:
            out.append(word[at])
            at += 1
            continue
        changes[pair] -= freq
        if out:
            changes[out[-1], pair[0]] -= freq
            changes[out[-1], new] += freq
            where[out[-1], new].add(index)
        at += 2
        if at <= last:
            changes[pair[1], word[at]] -= freq
            changes[new, word[at]] += freq
            where[new, word[at]].add(index)
        out.append(new)
    word[:] = out  # in place: fresh lists made the garbage collector half of the time


def _merge_with_rustbpe(texts: Iterable[str], n_merges: int) -> list[bytes]:
    """Do `_count_words` and `_merge_words` in Rust, on all cores."""
    try:
        import rustbpe
    except ImportError as error:
        raise ImportError("backend='rustbpe' needs `pip install rustbpe`") from error
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_clean_texts(texts), 256 + n_merges, pattern=PATTERN)
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
    return [bytes(token) for token, _ in ranked]
