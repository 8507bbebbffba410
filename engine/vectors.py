"""Vectors on disk: the documents of a collection, embedded once for `embed.py --query`."""
import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from engine.checkpoint import EXPORTED
from engine.collection import document_text, find_packed, read_with_ids
from engine.jsonl import atomic

INDEX_VERSION = 3                  # of the way that texts are embedded; raise it when that changes


def load_index(embedder, corpus):
    """Return (rows, vectors) of a collection's documents; the vectors are cached.

    The cache lies beside the checkpoint (of an export: in its folder). Its name carries the hashes
    of the file's place, and of model and content: when either changes, it is built anew.
    """
    path = Path(corpus) if Path(corpus).is_file() else find_packed(Path(corpus) / "corpus.jsonl")
    rows, where = list(read_with_ids(path)), embedder.checkpoint
    settings = f"{INDEX_VERSION} {embedder.fingerprint()}"
    place, content = (hashlib.sha256(x).hexdigest()[:16] for x in (
        os.fsencode(path.resolve()), settings.encode() + path.read_bytes()))
    folder = where if (where / EXPORTED).is_file() else where.parent
    cache = folder / f"index-{place}-{content}.npy"
    if not cache.is_file():
        print(f"embedding {len(rows):,} documents of {path} once", file=sys.stderr)
        vectors = embedder.encode([document_text(row) for row in rows], show_progress_bar=True)
        try:
            for old in folder.glob(f"index-{place}-*.npy"):
                old.unlink()
            with atomic(cache, "wb") as file:
                save_vectors(file, vectors)
        except OSError as error:                   # a folder that is read-only: search all the same
            print(f"the embeddings are not kept: {error}", file=sys.stderr)
            return rows, vectors
    try:
        return rows, np.load(cache, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{cache} is damaged, delete it: {error}") from None


def save_vectors(file, vectors):
    """Write vectors in .npy form; numpy's own way into a file does not see that a disk is full."""
    np.save(SimpleNamespace(write=file.write), vectors)
