"""Write a trained model as the folder that sentence-transformers and transformers load.

    python -m tools.export --checkpoint=out/embed_sup --out=DIR  # SentenceTransformer("DIR")
    python -m tools.export --checkpoint=out/sft --out=DIR --lm   # AutoModelForCausalLM

The tensors are those of a stock Llama, so the export is a copy and needs no code of ours. It is
bidirectional by `is_causal: false`, which transformers older than 5.2 ignore without a word. A
half-open soft mask has no stock architecture. `embed.Embedder("DIR")` is the way back. The golden
file has inputs and what they gave before the export; DIR appears after it was checked. Needs `pip
install safetensors`. docs/serving.md is about servers.
"""
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import load_config, run_command
from data import format_query, format_sft
from embed import Embedder
from engine.checkpoint import EXPORTED
from engine.jsonl import read_object, sha256_of, write_object
from engine.encoders import MTEB_TYPES
from engine.run import MAY_CHANGE_ON_RESUME
from sample import generate
from tokenizer import EOS, PAD, PATTERN

GOLDEN = ("The determinant of a matrix is zero if its rows are linearly dependent.",
          "def area(r):\n    return 3.14159 * r ** 2  # of a circle", "矩阵的行列式",
          "行列の階数を計算する", "محدد المصفوفة", "आव्यूह का सारणिक",
          "Определитель матрицы, ранг и след", "👩‍🔬 x² ≠ <|pad|>")
TOLERANCE = 1e-5
CARD = """---
library_name: {library}
---
# {name}

Trained from random weights with nanoConan, an open rebuild of Conan-Embedding-v2 (Li et al., EMNLP
2025, arXiv 2509.12892). `{loader}` of {library} loads it.
It needs transformers >= 5.2, since older ones take every model for causal.
`golden.json` holds inputs in several languages and what they gave before the export: a wrong
version, device or data type shows in it first. `nanoconan.json` holds the settings of the training.
"""


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of an export."""
    checkpoint: str                # a folder of train.py, or one checkpoint in it
    out: str                       # the folder to write; it must be new or empty
    lm: bool = False               # a causal language model, of stage pretrain or sft


def export(checkpoint, out, lm=False):
    """Write the folder `out` and return its path; it appears whole or not at all.

    Raises ValueError for a soft mask, a bidirectional `lm`, a place that is taken, and vectors that
    came out wrong.
    """
    out = Path(out).resolve()                          # so that "." has a name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; delete it, or choose another --out")
    embedder = Embedder(checkpoint, "cpu", "float32")
    mask, where = embedder.mask, embedder.checkpoint
    if not (mask.is_full or mask.is_causal):
        raise ValueError(f"{where}: its mask is half open, alpha {mask.alpha:g} (apply="
                         f"{mask.apply!r}), and no stock architecture has that; export a stage "
                         "that has run to its end")
    if lm and not mask.is_causal:
        raise ValueError(f"{where} is bidirectional, no language model any more; leave --lm out")
    part = out.parent / f".{out.name}.{os.getpid()}"
    try:
        write(embedder, part, out.name, lm)
        del embedder                                   # room for what is read back
        check_golden(part)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def write(embedder, folder, name, lm):
    """Fill `folder` with all the files of an export that is to be called `name`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    meta, tokenizer, prefix = embedder.meta, embedder.tokenizer, "model." if lm else ""
    weights = {prefix + k: v.contiguous() for k, v in embedder.model.state_dict().items()}
    try:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:               # a full disk, say
        raise OSError(f"{folder / 'model.safetensors'}: {error}") from None
    tokenizer.save(folder / "tokenizer.tiktoken")
    shutil.copymode(folder / "tokenizer.tiktoken", folder / "model.safetensors")   # it was 0600
    recipe = {key: value for key, value in meta["train"].items()
              if key not in MAY_CHANGE_ON_RESUME}      # no paths
    files = ({} if lm else sentence_transformers_files(embedder)) | {
        "config.json": architecture(embedder, lm),
        "tokenizer.json": tokenizer_json(tokenizer, None if lm else end_template(tokenizer)),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD,
            "split_special_tokens": True, "clean_up_tokenization_spaces": False,
            "padding_side": "left" if lm else "right",
            "model_max_length": embedder.model.config.block_size if lm else embedder.max_len},
        "golden.json": golden(embedder, lm),
        EXPORTED: {key: meta[key] for key in ("model", "mask", "passage_len", "step", "versions")} |
        {"prompts": embedder.prompts, "train": recipe, "files": {
            file: sha256_of(folder / file)
            for file in ("model.safetensors", "tokenizer.tiktoken")}}}
    for file, content in files.items():
        write_object(folder / file, content)
    (folder / "README.md").write_text(CARD.format(
        name=name, library="transformers" if lm else "sentence-transformers",
        loader="AutoModelForCausalLM" if lm else "SentenceTransformer"), encoding="utf-8")


# ---------------------------------------------------------------- the files

def architecture(embedder, lm):
    """Return config.json: the shape of the model in the words of transformers."""
    c, tokenizer = embedder.model.config, embedder.tokenizer
    config = {
        "architectures": ["LlamaForCausalLM" if lm else "LlamaModel"], "model_type": "llama",
        "is_causal": embedder.mask.is_causal, "vocab_size": c.vocab_size, "hidden_size": c.n_embd,
        "intermediate_size": c.ffn_dim, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim, "max_position_embeddings": c.block_size,
        "rope_theta": c.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": True, "use_cache": lm,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32", "transformers_version": "5.2.0"}
    if dims := embedder.meta["train"].get("dims"):
        config |= {"is_matryoshka": True, "matryoshka_dimensions": list(dims)}
    return config


def sentence_transformers_files(embedder):
    """Return {file: content} of the modules: transformer, pooling, normalisation, prompts.

    Prompts go by the names of sentence-transformers and mteb, as they stand in front of a text.
    `pool_prompt` of the model is `include_prompt` there. Both libraries count the prompt's tokens
    as those of the prompt alone, line end included and end of text excluded.
    """
    config = embedder.model.config
    prompts = {"query": embedder.prompts.get("retrieval", ""), "document": ""}
    prompts |= {theirs: prompt for theirs, ours in MTEB_TYPES.items()
                if ours != "retrieval" and (prompt := embedder.prompts.get(ours))}
    parts = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    return {
        "modules.json": [{"idx": i, "name": str(i), "path": path,
                          "type": f"sentence_transformers.models.{kind}"}
                         for i, (kind, path) in enumerate(parts)],
        "sentence_bert_config.json": {"max_seq_length": embedder.max_len, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": embedder.dim,
            "include_prompt": config.pool_prompt or config.pooling == "last",
            "pooling_mode_mean_tokens": config.pooling == "mean",
            "pooling_mode_lasttoken": config.pooling == "last"},
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "6.0.0", "transformers": "5.2.0",
                            "pytorch": torch.__version__},
            "prompts": {name: format_query("", prompt) for name, prompt in prompts.items()},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine"}}


# ---------------------------------------------------------------- the tokenizer

def end_template(tokenizer):
    """Return the post-processor that ends each text as `end_text` does, cut texts too."""
    end = {"SpecialToken": {"id": EOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {"type": "TemplateProcessing", "single": [first, end],
            "pair": [first, end, second, end], "special_tokens": {
                EOS: {"id": EOS, "ids": [tokenizer.eos_id], "tokens": [EOS]}}}


def tokenizer_json(tokenizer, post_processor=None):
    """Return the tokenizer in the form of the `tokenizers` library: the same ids for any text.

    NFC is that of the library's Unicode table: a few rare marks are missing in older ones. The
    special tokens stand in the vocabulary and not among the "added" ones, as those would be
    found inside of texts. post_processor: what adds tokens to a text; None adds none.
    """
    tokens, letter = tokenizer.tokens(), byte_letters()
    spelled = ["".join(letter[byte] for byte in token) for token in tokens]
    vocab = {word: rank for rank, word in enumerate([*spelled, EOS, PAD])}
    if len(vocab) != tokenizer.vocab_size:
        raise ValueError(f"a token of the vocabulary is spelled like {EOS} or {PAD}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "NFC"}, "post_processor": post_processor, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "model": {"type": "BPE", "ignore_merges": True,        # a whole word is looked up first
                  "vocab": vocab,
                  "merges": [[spelled[a], spelled[b]] for a, b in merges(tokens)]}}


def byte_letters():
    """Return the printable character that stands for each of the 256 bytes in tokenizer.json."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def merges(tokens):
    """Return [(left, right)], the pairs of ids whose join is a token, in the order of its id.

    tiktoken merges any neighbours whose join is a token, of the lowest id first.

    >>> merges([b"a", b"b", b"ab", b"aba"])
    [(0, 1), (2, 0)]
    """
    rank = {token: i for i, token in enumerate(tokens)}
    return [(rank[token[:i]], rank[token[i:]]) for token in tokens for i in range(1, len(token))
            if token[:i] in rank and token[i:] in rank]


# ---------------------------------------------------------------- golden values

def golden(embedder, lm):
    """Return inputs in several languages and what they give: vectors, or greedy continuations.

    Inputs carry no prompt. "query" is what the first one gives as a query.
    """
    if lm:
        inputs = [format_sft(None, text) for text in GOLDEN]
        return {"inputs": inputs, "greedy": [generate(
            embedder.model, embedder.tokenizer, text, 8, temperature=0) for text in inputs]}

    query = embedder.encode(GOLDEN[0], prompt=embedder.prompts.get("retrieval"))
    return {"inputs": list(GOLDEN), "query": np.round(query.astype(float), 8).tolist(),
            "embeddings": np.round(embedder.encode(GOLDEN).astype(float), 8).tolist()}


def check_golden(folder):
    """Load an export by `Embedder`; raise ValueError if it does not give its golden values."""
    expected = read_object(folder / "golden.json")
    values = golden(Embedder(folder, "cpu", "float32"), "greedy" in expected)
    right = values == expected if "greedy" in expected else all(
        np.allclose(values[key], expected[key], rtol=0, atol=TOLERANCE)      # not so for NaN
        for key in ("embeddings", "query"))
    if not right:
        raise ValueError(f"{folder}: gives other values than golden.json has")


# ---------------------------------------------------------------- command line

def main():
    """Export what the command line names."""
    config = load_config(ExportConfig)
    out = export(config.checkpoint, config.out, config.lm)
    print(f"wrote {out}, checked against golden.json; docs/serving.md says how to use it")


if __name__ == "__main__":
    run_command(main)
