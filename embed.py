"""From a checkpoint to vectors: `Embedder.encode`, and search on the command line.

    python embed.py --query "how do I compute the determinant of a matrix"
    python embed.py                                            # asks for one query after the other
    python embed.py --texts FILE --out x.npy --truncate_dim 64

A text is cut at the tokens that the model was trained for; `Embedder.max_len` may be set higher.

    from embed import Embedder
    vectors = Embedder("out/embed_sup").encode(["a text", "another one"])     # (2, D) float32

Evaluation, mining and export use it. PAPER Sec. 3.1.2: a query carries an instruction, a passage
does not. The instructions that a model was trained with travel in its checkpoint. Every prefix of
an embedding is an embedding (MRL), once it is normalised again.
"""
import argparse
import hashlib
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import run_command
from data import PROMPTS, format_query, prompt_length
from engine import kernels, memory
from engine.batch import end_text
from engine.checkpoint import EXPORTED, read_model
from engine.distributed import accelerator, choose_dtype, device_module
from engine.jsonl import atomic, check_name, read_texts
from engine.vectors import load_index, save_vectors
from mask import MaskSpec
from model import Conan, ConanConfig
from tokenizer import Tokenizer

TEXTS_AT_A_TIME = 20_000           # tokenised and sorted together: memory stays bounded
TOKENS_AT_A_TIME = 16_384          # short texts fill a batch up to this
MOST_TOKENS = 131_072              # of a batch of long texts


class Embedder:
    """A trained model as a function from texts to vectors.

    path: a folder of train.py (its newest good checkpoint is taken), one checkpoint in it, or a
    folder that tools/export.py wrote. device: "cpu", "cuda", "npu"; None takes the best one here.
    dtype: of the weights, float32 or bfloat16, by name or as torch has it; None is float32 on a
    CPU, and elsewhere bfloat16 where its matmuls are in hardware. Raises FileNotFoundError or
    ValueError with the path if there is no checkpoint or it is damaged.
    """
    checkpoint = meta = None       # of a model in memory

    def __init__(self, path, device=None, dtype=None):
        where, raw, weights = read_model(path)
        tokenizer = Tokenizer.load(where / "tokenizer.tiktoken")
        device = device or accelerator()
        device_module(str(device).partition(":")[0])       # ValueError if it is not there
        device = torch.device(device)
        self.dtype = _dtype(dtype, device)
        try:
            meta = json.loads(raw)
            config, mask = ConanConfig(**meta["model"]), MaskSpec(**meta["mask"])
            max_len, prompts = meta["passage_len"], dict(meta.get("prompts", PROMPTS))
            n_tokens, are_texts = tokenizer.vocab_size, {*map(type, prompts.values())} <= {str}
            if max_len < 1 or n_tokens > config.vocab_size or not are_texts:
                raise ValueError(f"passage_len {max_len}, prompts {prompts}, {n_tokens} tokens "
                                 f"for a model of {config.vocab_size}")
            with torch.device("meta"):             # neither memory nor random numbers
                model = Conan(config, ops=kernels.pick(device)).to(getattr(torch, self.dtype))
            model.to_empty(device=device).load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where}: its config is not train.py's, or does not fit its weights: "
                             f"{error!r}") from None
        self._set(model.eval(), tokenizer, mask, max_len, prompts)
        self.checkpoint, self.meta = where.resolve(), meta
        kernels.pack(model)

    @classmethod
    def of(cls, model, tokenizer, mask, max_len, prompts=PROMPTS, dtype=None):
        """Wrap a model that is in memory, as training does; its weights stay as they are."""
        self = cls.__new__(cls)
        self.dtype = _dtype(dtype, next(model.parameters()).device)
        self._set(model, tokenizer, mask, max_len, prompts)
        return self

    def _set(self, model, tokenizer, mask, max_len, prompts):
        self.model, self.tokenizer, self.mask, self.prompts = model, tokenizer, mask, dict(prompts)
        self.max_len = min(max_len, model.config.block_size)
        self.device = next(model.parameters()).device

    @property
    def dim(self):
        """Return D, the width of a whole embedding."""
        return self.model.config.n_embd

    def fingerprint(self):
        """Return a hash of what decides the vectors: the files of the model, and how it is used."""
        name = EXPORTED if (self.checkpoint / EXPORTED).is_file() else "manifest.json"
        used = f"{self.dtype} {self.max_len} {sorted(self.prompts.items())}".encode()
        return hashlib.sha256((self.checkpoint / name).read_bytes() + used).hexdigest()[:16]

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True,
               show_progress_bar=False):
        """Return (N, D) float32 of length 1, one row for each text; a single str gives (D,).

        prompt: the bare instruction of queries ("Find"); passages carry none. truncate_dim: how
        many first dims to keep. normalize: False leaves the vectors' lengths as they are.
        batch_size: texts in a pass, more if they are short, fewer if very long. An embedding does
        not depend on its batch. A text ends with the end-of-text token. One longer than the model
        was trained for is cut before it. Raises TypeError for what is no string. Raises ValueError
        for an instruction that leaves no room, and for a dim or batch size out of range.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size, prompt, truncate_dim, normalize)[0]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dim:
            raise ValueError(f"truncate_dim {truncate_dim} must lie in 1 .. {self.dim}")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is a {type(text).__name__}, not a string")
        out = np.empty((len(texts), truncate_dim or self.dim), dtype=np.float32)
        skip = prompt_length(self.tokenizer, prompt)
        if skip > self.max_len - 2:
            raise ValueError(f"the instruction has {skip} tokens, and the model reads "
                             f"{self.max_len}: nothing is left of a text")
        bar = tqdm(total=len(texts), unit="text", disable=not show_progress_bar, desc="encode")
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            part = [format_query(text, prompt) for text in texts[start:start + TEXTS_AT_A_TIME]]
            ids = [end_text(x, self.max_len, self.tokenizer.eos_id)
                   for x in self.tokenizer.encode_batch(part)]
            for batch in _batches(ids, batch_size):
                vectors = self._forward([ids[i] for i in batch], skip)[:, :out.shape[1]]
                if normalize:
                    vectors = F.normalize(vectors, dim=-1)
                out[start + np.array(batch)] = vectors.cpu().numpy()
                bar.update(len(batch))
        bar.close()
        return out

    @torch.no_grad()
    def _forward(self, ids, skip):
        flat = torch.tensor([i for text in ids for i in text], device=self.device)
        # the weights of training are float32; those of a loaded model need no casts
        casts = self.dtype == "bfloat16" and self.model.norm.weight.dtype == torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=casts):
            return self.model(flat, [len(text) for text in ids], self.mask, skip=[skip] * len(ids))


def _dtype(name, device):
    """Return "float32" or "bfloat16", by default the one that suits the device."""
    default = "float32" if device.type == "cpu" else choose_dtype("auto", device)
    dtype = str(name or default).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r} is unknown; choose float32 or bfloat16")
    return dtype


def _batches(ids, batch_size):
    """Yield lists of indices, texts of like lengths together, longest first."""
    order, start = sorted(range(len(ids)), key=lambda i: -len(ids[i])), 0
    while start < len(order):
        longest = len(ids[order[start]])
        n = max(1, min(max(batch_size, TOKENS_AT_A_TIME // longest), MOST_TOKENS // longest))
        yield order[start:start + n]
        start += n


# ---------------------------------------------------------------- search

def search(embedder, rows, vectors, query, k=10, prompt=None):
    """Return the k best [(score, row)] for a query, best first.

    vectors: (N, D) of the N rows, of length 1. prompt: the query's instruction; None takes the one
    that retrieval was trained with.
    """
    prompt = embedder.prompts.get("retrieval") if prompt is None else prompt
    scores = vectors @ embedder.encode(query, prompt=prompt)                # (N,)
    return [(float(scores[i]), rows[i]) for i in np.argsort(-scores, kind="stable")[:k]]


def run(args):
    """Embed a file of texts, or search; `args` as `main` parses them."""
    if args.texts and not args.out:
        raise ValueError("--texts needs --out=FILE.npy")
    if not args.texts and (args.out or args.truncate_dim) or args.texts and args.query:
        raise ValueError("--out and --truncate_dim are for --texts, --query is for a search")
    if args.out:
        check_name(args.out, [args.texts])
    if args.k < 1:
        raise ValueError(f"--k must be at least 1, not {args.k}")
    if args.query is not None and not args.query.strip():
        raise ValueError("--query is empty")
    memory.keep_freed_memory()             # on a CPU paging it in anew takes a quarter of the time
    embedder = Embedder(args.checkpoint, args.device)
    if args.texts:
        texts = read_texts(args.texts)
        with atomic(args.out, "wb") as file:       # a name that cannot be written shows now
            vectors = embedder.encode(texts, prompt=args.prompt, truncate_dim=args.truncate_dim,
                                      show_progress_bar=True)
            save_vectors(file, vectors)
        print(f"wrote {args.out}: {vectors.shape[0]:,} x {vectors.shape[1]} float32, of the first "
              f"{embedder.max_len} tokens of each text")
        return
    rows, vectors = load_index(embedder, args.corpus)
    while query := args.query or input("query (empty to stop): ").strip():
        results = search(embedder, rows, vectors, query, args.k, args.prompt)
        for place, (score, row) in enumerate(results, 1):
            lines = [line.strip() for line in row["text"].splitlines() if line.strip()]
            print(f"{place:>3}  {score:.3f}  {row['id']}\n            {' '.join(lines[:2])[:88]}")
        if args.query:
            return


def main():
    """Search, or embed a file of texts; see the module docstring."""
    parser = argparse.ArgumentParser(description="search or embed with a trained model")
    parser.add_argument("--checkpoint", default="out/embed_sup",
                        help="folder of train.py (%(default)s)")
    parser.add_argument("--query", help="search for this; without it queries are read one by one")
    parser.add_argument("--corpus", default="out/installed_docs/search",
                        help="JSONL file, or folder with corpus.jsonl (%(default)s)")
    parser.add_argument("--k", type=int, default=10, help="results to show (%(default)s)")
    parser.add_argument("--texts", help="embed this file instead: one text a line, or JSONL {text}")
    parser.add_argument("--out", help="with --texts: write the (N, D) float32 vectors here (.npy)")
    parser.add_argument("--prompt", help="the instruction, empty for none; default: of a query the "
                                         "trained one, of --texts none")
    parser.add_argument("--truncate_dim", type=int, help="with --texts: keep the first dims (MRL)")
    parser.add_argument("--device", help="cpu, cuda or npu; default: the best one here")
    args = parser.parse_args()
    try:
        run_command(lambda: run(args))
    except EOFError:                               # of the queries
        print()
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
