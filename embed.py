"""From a checkpoint to vectors: `Embedder.encode`, and search on the command line.

    python embed.py --query "how do I compute the determinant of a matrix"
    python embed.py                                            # asks for one query after the other
    python embed.py --texts FILE --out x.npy --truncate_dim 64

    from embed import Embedder
    vectors = Embedder("out/embed_sup").encode(["a text", "another one"])     # (2, D) float32

What evaluation, mining and export stand on. PAPER Sec. 3.1.2: a query carries an instruction, a
passage does not; every prefix of an embedding is one too (MRL), once it is normalised again.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import PROMPTS, format_query, read_jsonl
from engine import checkpoint
from engine.distributed import accelerator, has_fast_bf16
from mask import MaskSpec
from model import Conan, ConanConfig
from tokenizer import Tokenizer

EXPORTED = "nanoconan.json"        # marks a directory that export.py wrote
SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TEXTS_AT_A_TIME = 20_000           # tokenised and sorted together: memory stays bounded
TOKENS_AT_A_TIME = 4096            # short texts fill a batch up to this


class Embedder:
    """A trained model as a function from texts to vectors.

    path: a folder of train.py (its newest good checkpoint is taken), one checkpoint in it, or a
    directory that export.py wrote.
    device: "cpu", "cuda", "npu"; None takes the best one here. Computes in float32 on a CPU and in
    bfloat16 on an accelerator unless `dtype` says otherwise. Raises FileNotFoundError or ValueError
    with the path if there is no checkpoint or it is damaged.
    """

    def __init__(self, path, device=None, dtype=None):
        load = _load_exported if (Path(path) / EXPORTED).is_file() else _load_checkpoint
        where, meta, weights = load(path)
        tokenizer = Tokenizer.load(where / "tokenizer.tiktoken")
        try:
            mask, longest = MaskSpec(**meta["mask"]), meta["passage_len"]
            shape = dataclasses.asdict(ConanConfig(**meta["model"]))
            if longest < 1 or tokenizer.vocab_size > shape["vocab_size"]:
                raise ValueError(f"passage_len {longest}, {tokenizer.vocab_size} tokens for a "
                                 f"model of {shape['vocab_size']}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: its config is not train.py's: {error!r}") from None
        self._set(build_model(shape, weights, where), tokenizer, device or accelerator(), dtype,
                  mask, longest)
        self.checkpoint, self.meta = where, meta

    @classmethod
    def of(cls, model, tokenizer, device, dtype, mask, max_len):
        """Wrap a model that is in memory, as the training loop does for mining and evaluation."""
        self = cls.__new__(cls)
        self._set(model, tokenizer, device, dtype, mask, max_len)
        self.checkpoint = None
        return self

    def _set(self, model, tokenizer, device, dtype, mask, max_len):
        self.device = torch.device(device)
        self.dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        self.model, self.tokenizer, self.mask = model.to(self.device), tokenizer, mask
        self.max_len = min(max_len, model.config.block_size)

    @property
    def dim(self):
        """Return D, the width of a whole embedding."""
        return self.model.config.n_embd

    def fingerprint(self):
        """Return a hash of what decides the vectors: weights, shape, mask and tokenizer."""
        name = EXPORTED if (self.checkpoint / EXPORTED).is_file() else "manifest.json"
        entries = json.loads((self.checkpoint / name).read_text(encoding="utf-8"))
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True,
               show_progress_bar=False):
        """Return (N, D) float32, one row for each text, in their order; a single str gives (D,).

        prompt: an instruction for queries; passages carry none. truncate_dim: the first dims only,
        normalised again. A text longer than the model was trained for is cut, an empty one is the
        end-of-text token alone. batch_size: texts in a pass; more of them while they are short (an
        embedding does not depend on its batch mates). Raises TypeError for what is no string.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size, prompt, truncate_dim, normalize)[0]
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dim:
            raise ValueError(f"truncate_dim {truncate_dim} must lie in 1 .. {self.dim}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        width = truncate_dim or self.dim
        out = np.empty((len(texts), width), dtype=np.float32)
        bar = tqdm(total=len(texts), unit="text", disable=not show_progress_bar, desc="encode")
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            part = list(texts[start:start + TEXTS_AT_A_TIME])
            for i, text in enumerate(part):
                if not isinstance(text, str):
                    raise TypeError(f"text {start + i} is a {type(text).__name__}, not a string")
            ids = [x[:self.max_len] or [self.tokenizer.eos_id] for x in
                   self.tokenizer.encode_batch([format_query(text, prompt) for text in part])]
            for batch in _batches(ids, batch_size):
                vectors = self._forward([ids[i] for i in batch])[:, :width]     # (b, width)
                if normalize:
                    vectors = F.normalize(vectors, dim=-1)
                out[start + np.array(batch)] = vectors.cpu().numpy()
                bar.update(len(batch))
        bar.close()
        return out

    @torch.no_grad()
    def _forward(self, ids):
        flat = torch.tensor([i for text in ids for i in text], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.model(flat, [len(text) for text in ids], self.mask)


def _batches(ids, batch_size):
    """Yield lists of indices, texts of like lengths together, longest first."""
    batch, tokens = [], 0
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        full = len(batch) >= batch_size and tokens + len(ids[i]) > TOKENS_AT_A_TIME
        if batch and (full or len(batch) >= 64 * batch_size):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(ids[i])
    if batch:
        yield batch


def find_checkpoint(path):
    """Return the checkpoint folder that `path` is, or the newest good one inside it."""
    path = Path(path)
    if (path / "manifest.json").is_file() and (path / "config.json").is_file():
        return path
    found = checkpoint.latest(path) if path.is_dir() else None
    if found is None:
        raise FileNotFoundError(f"{path}: no checkpoint here; train one with "
                                f"`python train.py config/{path.name}.py`")
    return found


def _load_checkpoint(path):
    """Return (folder, config, weights) of a checkpoint; files are verified before they are read."""
    where = find_checkpoint(path)
    checkpoint.load(where, "tokenizer.tiktoken")
    raw = checkpoint.load(where, "config.json")
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where / 'config.json'}: not JSON: {error}") from None
    return where, meta, checkpoint.load(where, "model.pt")


def _load_exported(path):
    """Return the same of a directory that export.py wrote."""
    where = Path(path)
    try:
        meta = json.loads((where / EXPORTED).read_text(encoding="utf-8"))
        for name, sha256 in meta["files"].items():
            if not checkpoint.FILE_NAME.fullmatch(name):       # none leads outside
                raise KeyError(name)
            if hashlib.sha256(np.fromfile(where / name, np.uint8)).hexdigest() != sha256:
                raise ValueError(f"{where / name}: SHA-256 differs from {EXPORTED}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError,
            RecursionError) as error:
        raise ValueError(f"{where / EXPORTED}: not as export.py wrote it: {error!r}") from None
    weights = read_safetensors(where / "model.safetensors")
    return where, meta, {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def read_safetensors(path):
    """Return {name: tensor} of a file: the header's length (8 bytes), a JSON header, the data."""
    raw, tensors = np.fromfile(path, np.uint8), {}
    try:
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:start].tobytes())
        data = torch.from_numpy(raw[start:])
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                if not 0 <= first <= end <= len(data) or min(entry["shape"], default=0) < 0:
                    raise ValueError(f"{name} lies at {first} .. {end} of {len(data)} bytes")
                tensors[name] = data[first:end].view(SAFETENSORS[entry["dtype"]]).view(
                    entry["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: no whole safetensors file: {error!r:.200}") from None
    return tensors


def build_model(shape, weights, where):
    """Return a `Conan` of this shape with these weights; ValueError if they do not fit."""
    model = Conan(ConanConfig(**shape))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{where}: the weights do not fit the model: {error}") from None
    return model.eval()


# ---------------------------------------------------------------- search

def load_index(embedder, corpus):
    """Return (rows, vectors) of a collection's documents; the vectors are cached.

    The cache lies beside the checkpoint (in an exported directory: in it) and carries the hashes
    of checkpoint and corpus in its name: when either changes, it is built anew.
    """
    path = next((p for p in (Path(corpus) / "corpus.jsonl", Path(corpus) / "corpus.jsonl.gz",
                             Path(corpus)) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{corpus}: no corpus.jsonl here; train.py writes the embedded "
                                "documentation to out/installed_docs")
    rows = list(read_jsonl(path, {"id": str, "text": str}))
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    where = embedder.checkpoint
    folder = where if (where / EXPORTED).is_file() else where.parent
    cache = folder / f"index-{embedder.fingerprint()}-{content}.npy"
    if cache.is_file():
        return rows, np.load(cache, mmap_mode="r")
    if embedder.device.type == "cpu" and has_fast_bf16("cpu"):
        embedder.dtype = "bfloat16"                    # ranks are the same, and it is faster
    print(f"embedding {len(rows):,} documents of {path} once", file=sys.stderr)
    texts = [f"{row.get('title') or ''}\n{row['text']}".strip() for row in rows]
    vectors = embedder.encode(texts, show_progress_bar=True)
    for old in cache.parent.glob("index-*.npy"):
        old.unlink()
    part = cache.with_suffix(f".{os.getpid()}.npy")
    np.save(part, vectors)
    os.replace(part, cache)
    return rows, vectors


def search(embedder, rows, vectors, query, k=10, prompt=PROMPTS["retrieval"]):
    """Return the k best [(score, row)] for a query, best first."""
    scores = vectors @ embedder.encode(query, prompt=prompt)                # (N,)
    return [(float(scores[i]), rows[i]) for i in np.argsort(-scores, kind="stable")[:k]]


def show(results):
    """Print ranked names, scores and the first lines."""
    for place, (score, row) in enumerate(results, 1):
        lines = [line.strip() for line in row["text"].splitlines() if line.strip()]
        print(f"{place:>3}  {score:.3f}  {row['id']}\n            {' '.join(lines[:2])[:88]}")


def main():
    """Search, or embed a file of texts; see the module docstring."""
    parser = argparse.ArgumentParser(description="search or embed with a trained model")
    parser.add_argument("--checkpoint", default="out/embed_sup", help="folder of train.py")
    parser.add_argument("--query", help="search for this; without it queries are read one by one")
    parser.add_argument("--corpus", default="out/installed_docs/search",
                        help="folder with corpus.jsonl")
    parser.add_argument("--k", type=int, default=10, help="results to show")
    parser.add_argument("--texts", help="embed this file instead: one text a line, or JSONL {text}")
    parser.add_argument("--out", help="with --texts: write the (N, D) float32 vectors here (.npy)")
    parser.add_argument("--prompt", help="with --texts: the instruction in front of each text")
    parser.add_argument("--truncate_dim", type=int, help="keep the first dims only (MRL)")
    parser.add_argument("--device", help="cpu, cuda or npu; default: the best one here")
    args = parser.parse_args()
    try:
        embedder = Embedder(args.checkpoint, args.device)
        if args.texts:
            if not args.out:
                raise ValueError("--texts needs --out=FILE.npy")
            vectors = embedder.encode(read_texts(args.texts), prompt=args.prompt,
                                      truncate_dim=args.truncate_dim, show_progress_bar=True)
            np.save(args.out, vectors)
            print(f"wrote {args.out}: {vectors.shape[0]:,} x {vectors.shape[1]} float32")
            return
        rows, vectors = load_index(embedder, args.corpus)
        if args.query:
            show(search(embedder, rows, vectors, args.query, args.k))
            return
        while query := input("query (empty to stop): ").strip():
            show(search(embedder, rows, vectors, query, args.k))
    except (ValueError, OSError, TypeError) as error:
        sys.exit(f"embed.py: error: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


def read_texts(path):
    """Return the texts of a file: {"text"} rows if it is JSONL (also .gz), else its lines."""
    if Path(path).suffix in (".jsonl", ".gz"):
        return [row["text"] for row in read_jsonl(path, {"text": str})]
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in file]


if __name__ == "__main__":
    main()
