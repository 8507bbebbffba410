"""Write a trained model as the directory that sentence-transformers and transformers load.

    python -m tools.export --checkpoint=out/embed_sup --out=DIR        # SentenceTransformer("DIR")
    python -m tools.export --checkpoint=out/embed_sup --out=DIR --arch=eurobert
    python -m tools.export --checkpoint=out/sft --out=DIR --lm         # AutoModelForCausalLM, stages 1, 2

The tensors are those of a stock Llama, so the export is a copy and needs no code of ours: "llama"
is bidirectional by `is_causal: false`, which transformers older than 5.2 ignore in silence;
"eurobert", the same tensors under a name that is never causal, is refused by what is too old. A
half-open soft mask has no stock architecture. `embed.Embedder("DIR")` is the way back; by it the
golden file, inputs and what they gave before the export, is checked before DIR appears.
"""
import hashlib
import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import load_config
from data import format_query, format_sft
from embed import EXPORTED, SAFETENSORS, Embedder
from mask import CAUSAL
from model import Packing
from tokenizer import EOS, PAD

NEEDS = "sentence-transformers >= 6.0, transformers >= 5.2"
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", EXPORTED,
         "golden.json", "modules.json", "sentence_bert_config.json", "1_Pooling", "2_Normalize",
         "config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json",
         "tokenizer.tiktoken", "eval.json", "mteb"}     # the last two: scores that eval.py adds
MACHINE = {"previous", "train_missing", "out", "resume", "docs", "evaluate", "skip_bad_lines",
           "device", "log_every", "save_every", "keep_last"}       # no part of a training recipe
MTEB_NAMES = {"classification": "Classification", "sts": "STS", "bitext": "BitextMining"}
GOLDEN = ("The determinant of a matrix is zero if its rows are linearly dependent.",
          "def area(r):\n    return 3.14159 * r ** 2  # of a circle", "矩阵的行列式",
          "行列の階数を計算する", "محدد المصفوفة", "आव्यूह का सारणिक",
          "Определитель матрицы, ранг и след", "👩‍🔬 x² ≠ <|pad|>")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of an export."""
    checkpoint: str                # a folder of train.py, or one checkpoint in it
    out: str                       # the directory to write
    arch: Literal["llama", "eurobert"] = "llama"  # eurobert: old transformers refuse it loudly
    lm: bool = False               # a causal language model, of stage pretrain or sft

    def __post_init__(self):
        if self.lm and self.arch != "llama":
            raise ValueError(f"a causal language model is arch=llama, not {self.arch}")


def export(checkpoint, out, arch="llama", lm=False):
    """Write the directory `out` and return its path; it appears whole or not at all.

    An earlier export in its place is replaced. Raises ValueError for a soft mask, a bidirectional
    `lm`, a causal "eurobert", a directory that holds other files, and vectors that came out wrong.
    """
    out = Path(out).resolve()                          # so that "." has a name
    check_place(out)
    embedder = Embedder(checkpoint, "cpu", "float32")
    check_mask(embedder, arch, lm)
    part = out.parent / f".{out.name}.{os.getpid()}"
    part.mkdir(parents=True)
    try:
        write(embedder, part, out.name, arch, lm)
        del embedder                                   # room for what is read back
        check_golden(part)
        for file in filter(Path.is_file, part.rglob("*")):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if out.exists():
            old = part.with_name(f"{part.name}.old")
            os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old)
        else:
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def check_place(out):
    """Raise ValueError if `out` holds anything that an export would not have written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = {name for name in found - FILES if not name.startswith("index-")}
    if foreign or found and EXPORTED not in found:
        raise ValueError(f"{out} holds {', '.join(sorted(foreign or found)[:3])}, not of an "
                         "export; choose another --out")


def check_mask(embedder, arch, lm):
    """Raise ValueError if no stock architecture attends as this checkpoint does."""
    mask, where = embedder.mask, embedder.checkpoint
    if not (mask.is_full or mask.is_causal):
        raise ValueError(f"{where}: its mask is half open, alpha {mask.alpha:g} (apply="
                         f"{mask.apply!r}), and no stock architecture has that; export a stage "
                         "that has run to its end")
    if lm and not mask.is_causal:
        raise ValueError(f"{where} is bidirectional, no language model any more; leave --lm out")
    if arch == "eurobert" and not mask.is_full:
        raise ValueError(f"{where} is causal and arch=eurobert never is; use --arch=llama")


def write(embedder, folder, name, arch, lm):
    """Fill `folder` with all the files of an export that is to be called `name`."""
    def put(file, content):
        text = content if isinstance(content, str) else json.dumps(content, indent=1,
                                                                   ensure_ascii=False) + "\n"
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")

    meta, tokenizer = embedder.meta, embedder.tokenizer
    recipe = {k: [Path(f).name for f in v] if k in ("text", "pairs", "retrieval", "clr",
              "classification", "sts") else v for k, v in meta["train"].items()
              if k not in MACHINE}
    prefix = "model." if lm else ""
    write_safetensors(folder / "model.safetensors", {
        prefix + key: tensor for key, tensor in embedder.model.state_dict().items()})
    tokenizer.save(folder / "tokenizer.tiktoken")
    put("config.json", architecture(embedder, arch, lm, recipe.get("dims")))
    put("tokenizer.json", tokenizer_json(tokenizer))
    put("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD,
        "split_special_tokens": True, "clean_up_tokenization_spaces": False,
        "padding_side": "left" if lm else "right",
        "model_max_length": embedder.model.config.block_size if lm else embedder.max_len})
    if lm:
        put("generation_config.json", {"eos_token_id": tokenizer.eos_id, "do_sample": False,
                                       "pad_token_id": tokenizer.pad_id})
    else:
        for file, content in sentence_transformers_files(embedder).items():
            put(file, content)
    put("golden.json", golden(embedder, lm))
    put("README.md", model_card(embedder, name, arch, lm, recipe))
    put(EXPORTED, {"model": meta["model"], "mask": meta["mask"], "passage_len": meta["passage_len"],
                   "prompts": meta["prompts"], "step": meta["step"], "versions": meta["versions"],
                   "train": recipe, "files": {file: sha256(folder / file) for file in (
                       "model.safetensors", "tokenizer.tiktoken")}})


# ---------------------------------------------------------------- the files

def write_safetensors(path, tensors):
    """Write {name: tensor}: the header's length in 8 bytes, a JSON header, then the data."""
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                    # the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy())


def sha256(path):
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(np.fromfile(path, np.uint8)).hexdigest()


def architecture(embedder, arch, lm, dims=None):
    """Return config.json: the shape of the model in the words of transformers."""
    c, tokenizer = embedder.model.config, embedder.tokenizer
    names = {"llama": "LlamaForCausalLM" if lm else "LlamaModel", "eurobert": "EuroBertModel"}
    config = {
        "architectures": [names[arch]], "model_type": arch, "is_causal": embedder.mask.is_causal,
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "head_dim": c.head_dim,
        "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.block_size,
        "rope_theta": c.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "rms_norm_eps": c.norm_eps, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "use_cache": lm, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32", "transformers_version": "5.2.0"}
    if arch == "eurobert":                             # asks for one; a text never holds it
        config |= {"mask_token_id": tokenizer.pad_id, "classifier_pooling": "mean"}
    if dims:
        config |= {"is_matryoshka": True, "matryoshka_dimensions": list(dims)}
    return config


def sentence_transformers_files(embedder):
    """Return {file: content} of the modules: transformer, pooling, normalisation, prompts."""
    pooling = embedder.model.config.pooling
    modes = {"mean": "mean_tokens", "last": "lasttoken", "cls": "cls_token", "max": "max_tokens"}
    parts = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    return {
        "modules.json": [{"idx": i, "name": str(i), "path": path,
                          "type": f"sentence_transformers.models.{kind}"}
                         for i, (kind, path) in enumerate(parts)],
        "sentence_bert_config.json": {"max_seq_length": embedder.max_len, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": embedder.dim, "include_prompt": True,
            **{f"pooling_mode_{mode}": how == pooling for how, mode in modes.items()}},
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "6.0.0", "transformers": "5.2.0",
                            "pytorch": torch.__version__},
            "prompts": prompts(embedder.meta), "default_prompt_name": None,
            "similarity_fn_name": "cosine"}}


def prompts(meta):
    """Return {name: what stands in front of a text} by the names of sentence-transformers, mteb."""
    given = meta["prompts"]
    named = {"query": given["retrieval"], "document": ""}
    named |= {name: given[task] for task, name in MTEB_NAMES.items() if given.get(task)}
    return {name: format_query("", instruction) for name, instruction in named.items()}


# ---------------------------------------------------------------- the tokenizer

def tokenizer_json(tokenizer):
    """Return the tokenizer in the form of the `tokenizers` library: the same ids for any text.

    The special tokens stand in the vocabulary and not among the "added" ones, as those would be
    found inside of texts.
    """
    tokens = [tokenizer.encoding.decode_single_token_bytes(i) for i in range(tokenizer.eos_id)]
    letter = byte_letters()
    spell = ["".join(letter[byte] for byte in token) for token in tokens]
    vocab = {word: rank for rank, word in enumerate([*spell, EOS, PAD])}
    if len(vocab) != tokenizer.vocab_size:
        raise ValueError(f"a token of the vocabulary is spelled like {EOS} or {PAD}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": True,   # a whole word is looked up first
                  "vocab": vocab, "merges": [[spell[a], spell[b]] for a, b in merges(tokens)]}}


def byte_letters():
    """Return the printable character that stands for each of the 256 bytes in tokenizer.json."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def merges(tokens):
    """Return [(left, right)], the two ids that each token is merged from, in the order of ids.

    tiktoken merges any neighbours whose join is a token, of the lowest rank first. Inside of a
    token that goes as it does for the token alone, whatever stands around it, so the last two
    parts of the token's own merging are the only ones it ever has.

    >>> merges([b"a", b"b", b"ab", b"aba"])
    [(0, 1), (2, 0)]
    """
    rank, found = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [(rank.get(a + b, len(rank)), i) for i, (a, b) in enumerate(zip(parts,
                                                                                  parts[1:]))]
            best, at = min(pairs)
            if best == len(rank):                      # reached as a whole word only
                break
            parts[at:at + 2] = [tokens[best]]
        if len(parts) == 2:
            found.append((rank[parts[0]], rank[parts[1]]))
    return found


# ---------------------------------------------------------------- golden values

def golden(embedder, lm):
    """Return inputs in several languages and what they give: vectors, or greedy continuations."""
    if lm:
        inputs = [format_sft(None, text) for text in GOLDEN]
        ids = embedder.tokenizer.encode_batch(inputs)
        return {"inputs": inputs, "greedy_ids": [greedy(embedder.model, i, 8) for i in ids]}
    inputs = [prompts(embedder.meta)["query"] + GOLDEN[0], *GOLDEN]
    vectors = embedder.encode(inputs)
    return {"inputs": inputs, "embeddings": [[round(float(x), 8) for x in v] for v in vectors]}


def check_golden(folder):
    """Load an export by `Embedder`; raise ValueError if it does not give its golden values."""
    expected = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    embedder = Embedder(folder, "cpu", "float32")
    found = golden(embedder, "greedy_ids" in expected)
    if "embeddings" in found:
        far = np.abs(np.array(found["embeddings"]) - np.array(expected["embeddings"])).max()
        right = far <= TOLERANCE                       # not so for NaN
    else:
        right = found == expected
    if not right:
        raise ValueError(f"{folder}: gives other values than golden.json has")


@torch.no_grad()
def greedy(model, ids, n):
    """Return the `n` ids that a causal model holds most likely after `ids`, one by one."""
    ids = list(ids)
    for _ in range(n):
        packing = Packing([len(ids)], "cpu")
        hidden = model.hidden(torch.tensor(ids), packing, CAUSAL)                   # (T, D)
        ids.append(int((hidden[-1] @ model.embed_tokens.weight.T).argmax()))
    return ids[-n:]


# ---------------------------------------------------------------- the model card

CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [{tags}]
---
# {name}

A {kind} of {n_params:,} parameters, trained from random weights with nanoConan, an open
rebuild of Conan-Embedding-v2 (Li et al., EMNLP 2025, arXiv 2509.12892).

{facts}

## Use

```python
{code}
```

{notes}

## Check

`golden.json` holds inputs in several languages and what they gave before the export. A wrong
version, device or data type shows in it first:

```python
{check}
```

## Recipe

Stage `{stage}`, {step:,} of {steps:,} steps, nanoConan {git}, torch {torch}.

{recipe}

## Measured

{results}
"""
EMBED_CODE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["how do I invert a matrix"])         # in front: {prompt!r}
documents = model.encode_document(["Compute the inverse of a matrix."])
print(model.similarity(queries, documents))
short = model.encode_document(["..."], truncate_dim={dim}, normalize_embeddings=True)"""
EMBED_CHECK = """golden = json.load(open("{name}/golden.json", encoding="utf-8"))
print(abs(model.encode(golden["inputs"]) - np.array(golden["embeddings"])).max())   # below 1e-5"""
LM_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (c.from_pretrained("{name}") for c in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer({text!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))"""
LM_CHECK = """golden = json.load(open("{name}/golden.json", encoding="utf-8"))
ids = tokenizer(golden["inputs"][0], return_tensors="pt")["input_ids"]
print(model.generate(ids, max_new_tokens=8)[0, ids.shape[1]:].tolist(), golden["greedy_ids"][0])"""


def model_card(embedder, name, arch, lm, recipe):
    """Return README.md: what the model is, how to use and check it, its recipe and its scores."""
    meta, c, tokenizer = embedder.meta, embedder.model.config, embedder.tokenizer
    dims, query = recipe.get("dims"), prompts(meta)["query"]
    facts = {
        "dimensions": f"{c.n_embd}" + (f"; the first {', '.join(map(str, dims))} are embeddings "
                                       "too (Matryoshka), once normalised again" if dims else ""),
        "longest text": f"{c.block_size if lm else embedder.max_len:,} tokens",
        "vocabulary": f"{tokenizer.vocab_size:,}, byte-level BPE",
        "attention": "causal" if embedder.mask.is_causal else "bidirectional",
        "layout": f"{arch}: {c.n_layer} layers, {c.n_head} heads, {c.n_kv_head} key/value heads"}
    if not lm:
        facts |= {"pooling": c.pooling, "prompts": ", ".join(
            f"{key} `{text}`" for key, text in prompts(meta).items() if text)}
    notes = "" if lm else (
        f"Needs {NEEDS}" + (": older ones take the model for a causal one without a word. " if
                            arch == "llama" and embedder.mask.is_full else ". ") +
        "An empty text has no tokens: give none.")
    stage = meta["train"]["stage"]
    code, check = (LM_CODE, LM_CHECK) if lm else (EMBED_CODE, EMBED_CHECK)
    tags = ["nanoconan"] if lm else ["nanoconan", "sentence-transformers", "feature-extraction"]
    return CARD.format(
        library="transformers" if lm else "sentence-transformers", name=name,
        task="text-generation" if lm else "sentence-similarity", tags=", ".join(tags),
        kind="causal language model" if lm else "text embedder", notes=notes,
        n_params=embedder.model.count_params(), facts=markdown(["", ""], facts.items()),
        code=code.format(name=name, prompt=query, dim=min(dims or [c.n_embd]),
                         text=format_sft(None, GOLDEN[0])),
        check="import json\nimport numpy as np\n\n" * (not lm) + check.format(name=name),
        stage=stage, step=meta["step"], steps=meta["train"]["steps"],
        git=meta["versions"]["git"] or "", torch=meta["versions"]["torch"],
        recipe=markdown(["setting", "value"], [(k, json.dumps(v, ensure_ascii=False)) for k, v in
                                               recipe.items() if v not in ([], {}, "")]),
        results=measured(embedder))


def measured(embedder):
    """Return the tables of the run's eval.json, if the checkpoint is the one it was made with."""
    meta, path = embedder.meta, embedder.checkpoint.parent / "eval.json"
    last = meta["step"] >= meta["train"]["steps"]
    if not last or not path.is_file() or (embedder.checkpoint / EXPORTED).is_file():
        return "Nothing was measured with this checkpoint."
    sets = {}
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        if key.count("/") == 3 and not key.startswith(("dhnm/", "model/")):
            where, subset, metric = key.rsplit("/", 2)
            metric, _, dim = metric.partition(":")
            row = f"{subset}, first {dim} dims" if dim else subset
            sets.setdefault(where, {}).setdefault(row, {})[metric] = value
    tables = []
    for where, rows in sets.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        tables.append(markdown([where, *metrics], [
            [name, *(f"{row[m]:.4f}" if m in row else "" for m in metrics)]
            for name, row in rows.items()]))
    return "\n\n".join(tables) or "Nothing was measured with this checkpoint."


def markdown(head, rows):
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in
                     (head, ["---"] * len(head), *rows))


def main():
    """Export what the command line names."""
    config = load_config(ExportConfig)
    try:
        out = export(config.checkpoint, config.out, config.arch, config.lm)
    except (ValueError, OSError) as error:
        sys.exit(f"export: error: {error}")
    use = f'AutoModelForCausalLM.from_pretrained("{out}")' if config.lm else \
        f'SentenceTransformer("{out}")'
    print(f"wrote {out}, checked against golden.json; load it with {use}")


if __name__ == "__main__":
    main()
