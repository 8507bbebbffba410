"""An export gives the same ids and vectors in sentence-transformers and transformers as here.

    pip install sentence-transformers transformers tokenizers safetensors
    pytest -m extras tests/tools/test_export.py
"""
import dataclasses
import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from configurator import run_command
from data import PROMPTS
from embed import Embedder
from engine import checkpoint
from engine.checkpoint import read_safetensors
from engine.vectors import load_index
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig
from tokenizer import EOS, PAD, Tokenizer
from tools import export as module
from tools.export import byte_letters, check_golden, export, merges, tokenizer_json

pytestmark = pytest.mark.extras    # an export needs safetensors
LEXICON = Path(module.__file__).parent.parent / "toy" / "lexicon.tsv"   # 26 languages
CODE = Path(module.__file__).read_text(encoding="utf-8")
ODD = ["", " ", "\n", "\t", "\r\n", "\x00", "\u3000", "\u200b", "\ufeff", "   \n\n \t ", "\x85",
       "\u2028x", "a\x00b\x1c\x7f", f"{EOS}", f"a {PAD}{EOS} b", "<|", "👩‍👩‍👧‍👦 ❤️ 🇩🇪 3️⃣ 👍🏽",
       "\U0010ffff\ue000", unicodedata.normalize("NFD", "Việt École"), "12345678", "x" * 3000]


def languages():
    """Return {language: all its words of the lexicon, as one text}."""
    rows = [line.split("\t") for line in LEXICON.read_text(encoding="utf-8").splitlines()]
    return {column[0]: ", ".join(column[1:]) for column in zip(*rows)}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text[:1500] for text in languages().values()]
    return Tokenizer.train([*texts, *texts, CODE[:4000]], 900)


@pytest.fixture(scope="module")
def save(tokenizer, tmp_path_factory):
    """Return a function that writes a checkpoint with the files that train.py writes."""
    def save(stage="embed_sup", mask=FULL, step=7, dims=(16, 32), prompts=PROMPTS, **shape):
        shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "ffn_dim": 48,
                 "block_size": 128, "rope_base": 5000.0, "norm_eps": 1e-4} | shape
        config = ConanConfig(vocab_size=tokenizer.vocab_size + 3, **shape)
        torch.manual_seed(0)
        model = Conan(config).init_weights()
        with torch.no_grad():                  # far from initial, so that every weight counts
            for p in model.parameters():
                p.mul_(8) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
        run = tmp_path_factory.mktemp("run") / stage
        run.mkdir()
        path = run.parent / "tokenizer.tiktoken"
        tokenizer.save(path)
        train = {"stage": stage, "steps": 7, "dims": list(dims), "learning_rate": 0.001,
                 "out": str(run.parent), "retrieval": ["/home/me/secret/pairs.jsonl"],
                 "data": "/home/me/data", "previous": "/home/me/x.py", "device": "cuda"}
        files = {
            "model.pt": model.state_dict(), "trainer.pt": {"step": step},
            "tokenizer.tiktoken": path.read_bytes(),
            "config.json": json.dumps({
                "model": dataclasses.asdict(config), "train": train, "passage_len": 24,
                "mask": dataclasses.asdict(mask), "step": step, "prompts": prompts,
                "versions": {"git": "abc", "python": "3", "torch": "2", "numpy": "2"}})}
        checkpoint.save(run, step, files)
        return run
    return save


@pytest.fixture(scope="module")
def run(save):
    return save()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exports") / "mine")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sample(n=300, seed=0):
    """Return texts of all languages, code and odd characters, cut and mixed at random."""
    draw, texts = random.Random(seed), [*languages().values(), CODE]
    out = [*ODD, *texts]
    for _ in range(n):
        text = draw.choice(texts)
        start = draw.randrange(len(text))
        out.append(text[start:start + draw.randrange(1, 300)] + draw.choice(["", *ODD[:-1]]))
    return out


# ---------------------------------------------------------------- files

def test_the_files_of_an_export(exported):
    found = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert found == {
        "README.md", "config.json", "model.safetensors", "modules.json", "golden.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
        "2_Normalize/config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.tiktoken", "nanoconan.json"}
    assert [p.name for p in exported.parent.iterdir()] == ["mine"]         # no temporary folder
    config = read(exported / "config.json")
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaModel"]
    assert config["is_causal"] is False and config["head_dim"] == 8
    assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 2
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["matryoshka_dimensions"] == [16, 32]
    assert read(exported / "sentence_bert_config.json")["max_seq_length"] == 24
    pooling = read(exported / "1_Pooling" / "config.json")
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_lasttoken"]
    assert pooling["include_prompt"] is False
    st = read(exported / "config_sentence_transformers.json")
    assert st["prompts"] == {"query": "Find\n", "document": "",
                             "Classification": "Name the topic\n",
                             "MultilabelClassification": "Name the topic\n"}


def test_prompts_are_those_of_training(save, tmp_path):
    """In the template of training, so that a prompt's tokens are counted alike."""
    run = save(prompts=PROMPTS | {"retrieval": "Represent this question"})
    out = export(run, tmp_path / "x")
    prompt = read(out / "config_sentence_transformers.json")["prompts"]["query"]
    assert prompt + "text" == data.format_query("text", "Represent this question")
    assert Embedder(out).prompts == Embedder(run).prompts


def test_the_files_of_a_language_model(save, tmp_path):
    out = export(save("sft", CAUSAL), tmp_path / "lm", lm=True)
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "golden.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.tiktoken", "nanoconan.json"}
    config, names = read(out / "config.json"), read_safetensors(out / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["is_causal"] is True
    assert config["tie_word_embeddings"] and "lm_head.weight" not in names
    assert all(name.startswith("model.") for name in names)
    golden = read(out / "golden.json")
    assert len(golden["greedy"]) == len(golden["inputs"]) and all(golden["greedy"])


def test_the_model_card(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n") and "# mine\n" in card
    assert "transformers >= 5.2" in card


def test_the_recipe_has_nothing_of_one_machine(exported):
    recipe = read(exported / "nanoconan.json")["train"]
    assert recipe == {"stage": "embed_sup", "steps": 7, "dims": [16, 32], "learning_rate": 0.001}


# ---------------------------------------------------------------- the tokenizer

def test_merges_by_hand():
    """`aba` is a + ba and ab + a. In a text the pair ab comes first, which leaves ab + a."""
    assert merges([b"a", b"b", b"ab", b"ba", b"aba"]) == [(0, 1), (1, 0), (0, 3), (2, 0)]
    assert merges([b"a", b"b", b"abb"]) == []          # no pair of its parts is a token


def test_every_byte_has_a_letter_of_its_own():
    letters = byte_letters()
    assert len(set(letters)) == 256 and letters[ord("A")] == "A" and letters[ord(" ")] == "Ġ"
    assert letters[0] == "Ā" and all(letter.isprintable() for letter in letters)


# ---------------------------------------------------------------- the way back

@pytest.mark.parametrize("case", [
    {}, {"pooling": "last"}, {"pool_prompt": True}, {"stage": "sft", "mask": CAUSAL},
    {"dims": ()}, {"stage": "pretrain", "mask": CAUSAL, "lm": True}])
def test_an_export_loads_like_its_checkpoint(save, tmp_path, case):
    lm = case.get("lm", False)
    run = save(**{key: value for key, value in case.items() if key != "lm"})
    ours, back = Embedder(run), Embedder(export(run, tmp_path / "x", lm))
    texts = ["how do I sort a list", "def f(x): ...", "", "短", "x " * 100]
    assert np.array_equal(back.encode(texts), ours.encode(texts))
    assert np.array_equal(back.encode(texts, prompt="Q", truncate_dim=5),
                          ours.encode(texts, prompt="Q", truncate_dim=5))
    assert back.mask == ours.mask and back.max_len == ours.max_len == 24
    assert back.prompts == PROMPTS and back.meta["train"]["dims"] == list(
        case.get("dims", (16, 32)))


def test_fingerprints_tell_exports_apart(exported, save, tmp_path):
    other = export(save(n_layer=1), tmp_path / "other")
    again = shutil.copytree(exported, tmp_path / "copy")
    a, b, c = (Embedder(path).fingerprint() for path in (exported, other, again))
    assert a == c != b
    for name, value in (("max_len", 8), ("dtype", "bfloat16"), ("prompts", {"sts": "Say"})):
        embedder = Embedder(exported)
        setattr(embedder, name, value)
        assert embedder.fingerprint() != a


def test_a_search_index_stays_inside_the_export(exported, tmp_path):
    mine = shutil.copytree(exported, tmp_path / "mine")
    (tmp_path / "index-of-my-photos.npy").write_text("not ours")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    rows, vectors = load_index(Embedder(mine), corpus)
    assert vectors.shape == (2, 32) and len(list(mine.glob("index-*.npy"))) == 1
    assert (tmp_path / "index-of-my-photos.npy").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.tiktoken"])
def test_a_flipped_bit_is_found(exported, tmp_path, name):
    path = shutil.copytree(exported, tmp_path / "x") / name
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name}: SHA-256"):
        Embedder(path.parent)


def test_an_export_can_be_exported(exported, tmp_path):
    again, first = (read(folder / "golden.json")["embeddings"]
                    for folder in (export(exported, tmp_path / "x"), exported))
    assert np.abs(np.array(again) - np.array(first)).max() < 1e-6


# ---------------------------------------------------------------- golden values

def test_golden_values_are_those_of_the_checkpoint(run, exported):
    golden = read(exported / "golden.json")
    ours = Embedder(run)
    assert np.abs(ours.encode(golden["inputs"]) - np.array(golden["embeddings"])).max() < 1e-7
    query = ours.encode(golden["inputs"][0], prompt=PROMPTS["retrieval"])
    assert np.abs(query - np.array(golden["query"])).max() < 1e-7
    assert np.abs(query - np.array(golden["embeddings"][0])).max() > 1e-3
    assert len({unicodedata.name(text[0]).split()[0] for text in golden["inputs"]}) >= 4  # scripts


def test_a_wrong_export_is_never_published(run, tmp_path, monkeypatch):
    """The weights are damaged on their way to the disk: the golden values give it away."""
    import safetensors.torch
    save_file = safetensors.torch.save_file

    def damaged(tensors, path, metadata):
        save_file(tensors | {"norm.weight": -tensors["norm.weight"]}, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", damaged)
    with pytest.raises(ValueError, match="golden.json"):
        export(run, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lm", [False, True])
def test_golden_values_are_compared(save, tmp_path, lm):
    out = export(save("sft", CAUSAL), tmp_path / "x", lm=lm)
    check_golden(out)
    golden = read(out / "golden.json")
    if lm:
        golden["greedy"][1] += "!"
    else:
        golden["embeddings"][1][3] += 2e-5
    (out / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ValueError, match="other values"):
        check_golden(out)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize(("mask", "options", "match"), [
    (MaskSpec(0.5), {}, r"half open, alpha 0.5"),
    (MaskSpec(0.0, apply="logits"), {}, r"half open, alpha 0 \(apply='logits'\)"),
    (MaskSpec(0.5), {"lm": True}, "half open"),
    (FULL, {"lm": True}, "bidirectional"),
])
def test_masks_that_no_stock_model_has(save, tmp_path, mask, options, match):
    with pytest.raises(ValueError, match=match):
        export(save(mask=mask), tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run, exported, tmp_path):
    export(run, tmp_path)                              # an empty folder may be filled
    (tmp_path.parent / "file").write_text("")
    for taken in (exported, checkpoint.latest(run), tmp_path.parent / "file"):
        with pytest.raises(ValueError, match="is there already"):
            export(run, taken)


def test_the_command_line(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "x"
    monkeypatch.setattr(sys, "argv", ["export.py", f"--checkpoint={run}", f"--out={out}"])
    module.main()
    assert str(out) in capsys.readouterr().out and (out / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint=nowhere", f"--out={out}2"])
    with pytest.raises(SystemExit, match=r"^export.py: error: nowhere: no checkpoint"):
        run_command(module.main)


# ---------------------------------------------------------------- the tools that people use

@pytest.fixture(scope="module")
def hub_offline():
    """Nothing here may ask the network; set before the libraries are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers", minversion="5.2")


@pytest.fixture(scope="module")
def sentence_transformer(hub_offline):
    library = pytest.importorskip("sentence_transformers", minversion="6")
    return lambda path, **options: library.SentenceTransformer(str(path), device="cpu", **options)


def test_ids_are_equal_in_the_tokenizers_library(exported, tokenizer):
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_file(str(exported / "tokenizer.json"))
    for text in sample():
        assert theirs.encode(text).ids == tokenizer.encode(text) + [tokenizer.eos_id], \
            repr(text[:80])
        assert theirs.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    # a word that no pair of tokens leads to is looked up whole
    whole = Tokenizer({bytes([byte]): byte for byte in range(256)} | {b"xyz": 256})
    theirs = library.Tokenizer.from_str(json.dumps(tokenizer_json(whole)))
    assert theirs.encode("xyz (xyz)").ids == whole.encode("xyz (xyz)") == [256, 32, 40, 256, 41]


@pytest.mark.parametrize("letters", ["a", "ab", "abc"])
@pytest.mark.filterwarnings("ignore:vocab_size")               # few pairs in "aaaa"
def test_ids_are_equal_in_repetitive_text(letters):
    """Runs, where leftmost-first and overlaps matter most."""
    library, draw = pytest.importorskip("tokenizers"), random.Random(len(letters))
    texts = ["".join(draw.choices(letters, k=30)) + " " for _ in range(200)]
    tokenizer = Tokenizer.train(texts, 400)
    theirs = library.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for _ in range(100):
        text = "".join(draw.choices(letters, k=draw.randrange(1, 80)))
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_ids_are_equal_for_every_character(exported, tokenizer):
    """All of Unicode: both programs put a character into the same class.

    The planes 4 to 13, 15 and 16 have none but unassigned and private ones: one in 256 of these.
    """
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_file(str(exported / "tokenizer.json"))
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000
             and (i >> 16 in (0, 1, 2, 3, 14) or i % 256 == 0)]
    for start in range(0, len(every), 512):
        for form in ("{0}", "a{0}b1 {0}", "({0} न{0})"):
            text = "|".join(form.format(char) for char in every[start:start + 512])
            assert theirs.encode(text).ids[:-1] == tokenizer.encode(text), hex(ord(every[start]))


def test_ids_are_equal_in_transformers(hub_offline, exported, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    for text in sample():
        ids = tokenizer.encode(text) + [tokenizer.eos_id]
        assert theirs(text)["input_ids"] == ids, repr(text[:80])
        assert theirs(text, truncation=True)["input_ids"] == ids[:-1][:23] + ids[-1:]
    assert theirs.pad_token_id == tokenizer.pad_id and theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 24


@pytest.mark.parametrize("case", [
    {}, {"pool_prompt": True}, {"pooling": "last"}, {"mask": CAUSAL, "pooling": "last"},
    {"mask": CAUSAL}, {"n_kv_head": 4}, {"n_kv_head": 1}])
def test_vectors_are_equal_in_sentence_transformers(sentence_transformer, save, tmp_path, case):
    """With the prompt and without, whole and cut; text is in NFC, NFD and of odd characters."""
    ours = Embedder(run := save(**case))
    theirs = sentence_transformer(export(run, tmp_path / "x"))
    texts = sample(40)                                 # the first one is empty
    texts += [unicodedata.normalize("NFD", text) for text in texts[-20:]]
    prompt = PROMPTS["retrieval"]
    assert np.abs(theirs.encode(texts) - ours.encode(texts)).max() < 1e-5
    assert np.abs(theirs.encode_query(texts) - ours.encode(texts, prompt=prompt)).max() < 1e-5
    assert np.abs(theirs.encode_document(texts) - ours.encode(texts)).max() < 1e-5
    cut = theirs.encode_query(texts, truncate_dim=16, normalize_embeddings=True)
    assert np.abs(cut - ours.encode(texts, prompt=prompt, truncate_dim=16)).max() < 1e-5
    assert theirs.max_seq_length == 24 and theirs.similarity_fn_name == "cosine"


@pytest.mark.parametrize("prompt", [None, "Find", "little room"])
def test_empty_and_cut_texts_alone_and_beside_others(sentence_transformer, run, exported, prompt):
    """The end of a text is a token that all have, so that the empty one has a unit vector."""
    theirs, ours = sentence_transformer(exported), Embedder(run)
    front = data.format_query("", prompt)
    texts = ["one text", "", *("matrix"[:n] + " 1" * 20 for n in range(7)), "x " * 100]
    expected = ours.encode(texts, prompt=prompt)
    assert np.abs(theirs.encode(texts, prompt=front) - expected).max() < 1e-5
    for text, vector in zip(texts, expected):
        assert np.abs(theirs.encode([text], prompt=front)[0] - vector).max() < 1e-5
    assert np.linalg.norm(expected, axis=1) == pytest.approx(1)


def test_a_text_is_cut_at_the_same_token(sentence_transformer, run, exported):
    """Around the limit of 24, the end included: the last token that counts does count."""
    theirs, ours = sentence_transformer(exported), Embedder(run)
    assert ours.tokenizer.encode("12345") == [ord(c) for c in "12345"]  # a token for each digit
    texts = ["1" * n for n in (21, 22, 23, 24, 25)]
    vectors = theirs.encode(texts)
    assert np.abs(vectors - ours.encode(texts)).max() < 1e-5
    assert np.abs(np.diff(vectors, axis=0)).max(1)[:2].min() > 1e-4
    assert np.abs(vectors[2:] - vectors[2]).max() < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("mask", "sees"), [(FULL, True), (CAUSAL, False)])
def test_the_first_token_sees_the_last_one(hub_offline, save, tmp_path, mask, sees, attention):
    """The commonest bug: a model that is causal in one path. One text, many; pads left, right."""
    from transformers import AutoModel

    where = export(save(mask=mask), tmp_path / "x")
    model = AutoModel.from_pretrained(where, attn_implementation=attention).eval()
    for left, right, batch, given in ((0, 0, 1, False), (0, 0, 1, True), (0, 0, 3, True),
                                      (0, 4, 1, True), (0, 4, 3, True), (4, 0, 3, True)):
        ids = torch.randint(0, 500, (batch, left + 9 + right))
        tokens = torch.zeros_like(ids)
        tokens[:, left:left + 9] = 1
        other = ids.clone()
        other[:, left + 8] = (other[:, left + 8] + 1) % 500
        with torch.no_grad():
            a, b = (model(x, attention_mask=tokens if given else None).last_hidden_state
                    for x in (ids, other))
        moved = (a - b)[:, left].abs().amax(-1)
        assert ((moved > 1e-3) if sees else (moved < 1e-6)).all(), (left, right, batch, given)
        assert ((a - b)[:, left + 8].abs().amax(-1) > 1e-3).all()


def test_a_language_model_has_the_same_logits_and_words(hub_offline, save, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = save("sft", CAUSAL)
    where, ours = export(run, tmp_path / "x", lm=True), Embedder(run).model
    theirs = AutoModelForCausalLM.from_pretrained(where).eval()
    words = AutoTokenizer.from_pretrained(where)
    golden = read(where / "golden.json")
    for text, expected in zip(golden["inputs"], golden["greedy"]):
        ids = words(text, return_tensors="pt")
        assert ids["input_ids"][0].tolist() == tokenizer.encode(text)
        flat = ids["input_ids"][0]
        with torch.no_grad():
            hidden = ours.hidden(flat, [len(flat)], CAUSAL)
            logits = hidden @ ours.embed_tokens.weight.T
            assert (theirs(**ids).logits[0] - logits).abs().max() < 1e-4 * logits.abs().max()
        out = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0, len(flat):]
        assert words.decode(out, skip_special_tokens=True) == expected
    assert sum(p.numel() for p in theirs.parameters()) == ours.count_params()     # tied
