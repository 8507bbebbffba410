"""Byte-level BPE: worked by hand, equal to naive training and encoding, safe on any text."""

import base64
import os
import random
import time
import unicodedata
import warnings
from collections import Counter

import pytest
import regex

import tokenizer as module
from tokenizer import EOS, PAD, PATTERN, Tokenizer

SAMPLES = {
    "english": "The matrix_rank of a Hermitian matrix isn't 12345, e.g. matrix.T @ matrix.",
    "code": "def getItem(self, HTTPServer=None):\n    return self.__dict__['x']  # None\n\n\tx\r\n",
    "chinese": "使用numpy库计算矩阵的秩。第2章:线性代数",
    "japanese": "行列のランクを計算する。データサイエンス、々",
    "korean": "행렬의 계수를 계산합니다.",
    "hindi": "आव्यूह की कोटि की गणना करें। हिन्दी",
    "thai": "คำนวณอันดับของเมทริกซ์ ภาษาไทย",
    "arabic": "احسب رُتبة المصفوفة، مرحبًا",
    "hebrew": "חשב את דרגת המטריצה",
    "russian": "Вычислить ранг матрицы, ЁЛКА",
    "greek": "Υπολόγισε τον βαθμό του πίνακα",
    "decomposed": unicodedata.normalize("NFD", "ÉCOLE déjà vu, Việt Nam"),
    "emoji": "👩‍👩‍👧‍👦 ❤️ 🇩🇪 3️⃣ 👍🏽",
    "odd": "\x00 a\x00b \u200b\ufeff \U0010ffff \x85\u2028 \t \x1c",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(list(SAMPLES.values()) * 2, 700)


def words_of(text):
    return regex.findall(PATTERN, unicodedata.normalize("NFC", text))


def naive_train(texts, n_merges):
    """The definition: recount all pairs of all words, merge the best one everywhere, repeat."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in words_of(text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + n_merges:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        ranked = [(-n, tokens.index(a), tokens.index(b), (a, b)) for (a, b), n in pairs.items()]
        best = min(ranked)[-1] if ranked else None
        if best is None or pairs[best] < 2:
            break
        assert best[0] + best[1] not in tokens
        tokens.append(best[0] + best[1])
        words = [naive_merge(word, best) for word in words]
    return tokens


def naive_merge(word, pair):
    out = []
    while word:
        size = 2 if tuple(word[:2]) == pair else 1
        out.append(b"".join(word[:size]))
        word = word[size:]
    return out


def naive_encode(tokens, text):
    """Join the neighbours whose token has the lowest id, leftmost first, until none are left."""
    ids = {token: index for index, token in enumerate(tokens)}
    out, none = [], len(tokens)
    for word in words_of(text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            joined = [ids.get(a + b, none) for a, b in zip(parts, parts[1:])]
            rank = min(joined, default=none)
            if rank == none:
                break
            at = joined.index(rank)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [ids[part] for part in parts]
    return out


def test_worked_example():
    """`aaabdaaabac`, by hand; the lower pair of ids wins a tie, 'a' is 97 and 'b' 98.

    aaabdaaabac    aa 4, ab 2 and the rest once              -> 256 = aa
    Z a b d Z a b a c    (a b) 2, (Z a) 2; (97, 98) < (256, 97)  -> 257 = ab
    Z Y d Z Y a c        (Z Y) 2                                 -> 258 = aaab
    X d X a c            nothing occurs twice: stop, three merges of the ten asked for
    """
    with pytest.warns(UserWarning, match="261 entries learned"):
        tokenizer = Tokenizer.train(["aaabdaaabac"], 268)
    assert tokenizer.tokens()[256:] == [b"aa", b"ab", b"aaab"]
    assert tokenizer.encode("aaabdaaabac") == [258, 100, 258, 97, 99]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (259, 260, 261)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("getItem(x)", ["get", "Item", "(", "x", ")"]),
        ("HTTP_URL HTTPServer", ["HTTP", "_", "URL", " HTTPServer"]),
        (" _matrix.matrix(matrix", [" _", "matrix", ".", "matrix", "(", "matrix"]),
        ("matrix matrix  matrix", ["matrix", " matrix", "  ", "matrix"]),
        ("1234567 x2", ["123", "456", "7", " x", "2"]),
        ("x:\n\n    return", ["x", ":", "\n\n", "    ", "return"]),
        ("用numpy库", ["用", "numpy", "库"]),
        ("हिन्दी भाषा", ["हिन्दी", " भाषा"]),
        ("データ", ["データ"]),
        (unicodedata.normalize("NFD", "École ÉCOLE"), ["École", " ÉCOLE"]),
        ("❤️ ok", ["❤️", " ok"]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_words_cover_every_character():
    chars = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    assert "".join(regex.findall(PATTERN, "".join(chars))) == "".join(chars)


def random_texts(rng, n_texts=8):
    alphabet = rng.choice(["ab", "ab ", "abc AB.1\n", "aé日 न्"])
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(n_texts)]


@pytest.mark.filterwarnings("ignore:vocab_size")
def test_training_equals_naive():
    rng = random.Random(0)
    for _ in range(60):
        texts, n_merges = random_texts(rng), rng.randrange(60)
        assert Tokenizer.train(texts, 258 + n_merges).tokens() == naive_train(texts, n_merges)


@pytest.mark.filterwarnings("ignore:vocab_size")
def test_encoding_equals_naive(tokenizer):
    rng = random.Random(1)
    for text in SAMPLES.values():
        assert tokenizer.encode(text) == naive_encode(tokenizer.tokens(), text)
    for _ in range(30):
        texts = random_texts(rng)
        trained = Tokenizer.train(texts, 320)
        for text in [*texts, *random_texts(rng)]:
            assert trained.encode(text) == naive_encode(trained.tokens(), text)


def test_a_full_vocabulary_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = Tokenizer.train(iter(list(SAMPLES.values()) * 2), 300)  # a one-pass iterable
    assert tokenizer.vocab_size == 300
    assert Tokenizer.train([], 258).vocab_size == 258


def test_round_trip_of_random_unicode(tokenizer):
    rng = random.Random(2)
    for _ in range(300):
        points = [rng.randrange(rng.choice([128, 0x3000, 0x110000])) for _ in range(40)]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("text", ["Café", "Tiếng Việt", "한국어", "Ångström ﬁ"])
def test_two_spellings_of_a_letter_are_one(text):
    """Composed and decomposed, in use and in training; compatibility forms (ﬁ) stay."""
    spellings = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    trained = [Tokenizer.train([spelling] * 2, 280) for spelling in spellings]
    assert trained[0].tokens() == trained[1].tokens()
    assert trained[0].encode(spellings[0]) == trained[0].encode(spellings[1])
    assert trained[0].encode_batch(spellings) == [trained[0].encode(spellings[0])] * 2
    assert trained[0].decode(trained[0].encode(spellings[1])) == spellings[0]


def test_odd_texts(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("\x00") == [0]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is one emoji
    assert tokenizer.decode(["é".encode()[0]]) == "\ufffd"              # half of a character
    # Training sees the same repair: U+FFFD is ef bf bd, and (bf, bd) is below (ef, bf).
    assert Tokenizer.train(["\ud800", "\udc00"], 259).tokens()[256] == b"\xbf\xbd"


def test_special_tokens_are_not_injected(tokenizer):
    ids = tokenizer.encode(f"{EOS}{PAD} {EOS}")
    assert max(ids) < tokenizer.eos_id < tokenizer.pad_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids) == f"{EOS}{PAD} {EOS}"
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == EOS + PAD


@pytest.mark.parametrize("repeat", [1, 300])  # short texts in a loop, long ones on threads
def test_batch_equals_single(tokenizer, repeat):
    texts = ["", *(text * repeat for text in SAMPLES.values())]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.bpe"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.tokens() == tokenizer.tokens()
    assert (loaded.eos_id, loaded.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    for text in SAMPLES.values():
        assert loaded.encode(text) == tokenizer.encode(text)
    again = tmp_path / "again.bpe"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.bpe", "tokenizer.bpe"]  # no partial file


def test_file_without_its_header_is_tiktokens(tokenizer, tmp_path):
    from tiktoken.load import load_tiktoken_bpe

    tokenizer.save(tmp_path / "ours")
    lines = (tmp_path / "ours").read_bytes().splitlines(keepends=True)
    (tmp_path / "theirs").write_bytes(b"".join(lines[1:]))
    theirs = load_tiktoken_bpe(str(tmp_path / "theirs"))
    assert theirs == {token: rank for rank, token in enumerate(tokenizer.tokens())}


def test_fingerprints_tell_tokenizers_apart():
    one, two = (Tokenizer.train([text], 259) for text in ("a b a b", "a c a c"))
    again = Tokenizer.train(["a b a b"], 259)
    assert one.fingerprint() == again.fingerprint() != two.fingerprint()


def test_a_file_without_one_of_the_bytes_is_damaged(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.bpe"
    lines = tokenizer.to_bytes().splitlines()
    lines[6] = base64.b64encode(b"new") + b" 5"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=f"{path}: has 698 tokens, 255 of them single bytes"):
        Tokenizer.load(path)


def test_errors():
    with pytest.raises(ValueError, match="vocab_size=257"):
        Tokenizer.train(["a"], 257)
    with pytest.raises(TypeError, match="texts is one str"):
        Tokenizer.train("abc", 300)


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("char", ["a", " ", "\n", "=", "日", "ู", "é", "1", "ab \n\t"])
def test_long_runs_take_linear_time(char):
    text = char * 150_000
    begin = time.perf_counter()
    tokenizer = Tokenizer.train([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - begin < 15  # half a second; a quadratic step would take minutes


def test_long_words_are_cut_in_training_only(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORD", 4)
    counts = module._count_words(["abcdefghij,       ab 12345 xyzt"])
    words = ["abcd", "efgh", "ij", ",", " " * 7, "ab", " ", "123", "45", " xyz", "t"]
    assert counts == Counter(words)
