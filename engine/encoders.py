"""Encoders in eval.py: one with a memory, and BM25.

An encoder has the `encode` of embed.Embedder, and may have its `prompts`. A stock model chooses its
prompts by itself: see engine.mteb_bridge.SentenceTransformerBaseline.
"""
import functools

import numpy as np

from engine.mteb_bridge import prompt_of


class CachedEncoder:
    """Encode each text once per prompt, at full width, and serve every prefix of it from memory.

    The languages of one set share their English side, and `dims` share everything.
    """

    def __init__(self, encoder, dim=None):
        self.encoder, self.dim, self.tables = encoder, dim, {}
        self.prompt_of = functools.partial(prompt_of, encoder)

    def first(self, dim):
        """Return an encoder of the first `dim` dimensions that shares this one's memory."""
        encoder = CachedEncoder(self.encoder, dim)
        encoder.tables = self.tables
        return encoder

    def encode(self, texts, prompt=None):
        """Return unit vectors (N, dim) float32; ValueError if one is not finite."""
        table = self.tables.setdefault(prompt, {})
        new = [text for text in dict.fromkeys(texts) if text not in table]
        if new:
            vectors = self.encoder.encode(new, prompt=prompt)
            bad = np.flatnonzero(~np.isfinite(vectors).all(1))
            if bad.size:
                raise ValueError(f"the embedding of {new[bad[0]][:80]!r} is not finite")
            table.update(zip(new, vectors))
        vectors = np.stack([table[text] for text in texts])
        if self.dim is None:
            return vectors
        if not 0 < self.dim <= vectors.shape[1]:
            raise ValueError(f"dims must be in 1..{vectors.shape[1]}, got {self.dim}")
        vectors = vectors[:, :self.dim]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class LexicalBaseline:
    """BM25 in an encoder's place: it ranks documents, but has no vectors."""

    def encode(self, texts, **_):
        """Raise ValueError: there are no vectors."""
        raise ValueError("BM25 has no vectors: it is for retrieval, mkqa and bitext")
