"""What eval.py scores: encoders with a memory or on all ranks, BM25, stock models; ours in mteb.

    mteb.evaluate(MTEBModel(Embedder("out/embed_sup")), mteb.get_tasks(tasks=["STS17"]))

An encoder has the `encode` of embed.Embedder, and may have its `prompts`. mteb and
sentence-transformers are optional and imported where they are used.
"""
import contextlib
import functools
import re

import numpy as np
import torch

MTEB_TYPES = {                     # mteb's types of task, and which of ours has their prompt
    "Retrieval": "retrieval", "InstructionRetrieval": "retrieval",
    "Reranking": "retrieval", "InstructionReranking": "retrieval", "BitextMining": "bitext",
    "STS": "sts", "PairClassification": "pair_classification", "Classification": "classification",
    "MultilabelClassification": "classification", "Clustering": "clustering"}
OUR_TYPES = {ours: theirs for theirs, ours in reversed(MTEB_TYPES.items())}


def prompt_of(encoder, kind, side=None):
    """Return the prompt of a text by its task's type, ours or mteb's, and its side of it.

    side: "query" or "document" in retrieval and reranking, None in symmetric tasks. An encoder
    chooses by a `prompt_of` of its own, or has `prompts`; then documents carry none.
    """
    if hasattr(encoder, "prompt_of"):
        return encoder.prompt_of(kind, side)
    kind = MTEB_TYPES.get(kind, kind)
    return None if side == "document" else getattr(encoder, "prompts", {}).get(kind)


def join_names(parts):
    """Undo the command line's split at the comma of a name in brackets.

    >>> join_names(("STS17", "MTEB(eng", "v2)"))
    ['STS17', 'MTEB(eng, v2)']
    """
    names = re.findall(r"(?:\([^)]*\)|[^,])+", ", ".join(parts))
    return [name.strip() for name in names]


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
        width = len(table[texts[0]])
        if self.dim is not None and not 0 < self.dim <= width:
            raise ValueError(f"dims must be in 1..{width}, got {self.dim}")
        vectors = np.stack([table[text][:self.dim] for text in texts])      # the one copy
        for part in np.split(vectors, range(1024, len(vectors), 1024)) if self.dim else ():
            part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        return vectors


class SharedEncoder:
    """Encode on all ranks, every W-th text on each; the main rank asks, the others `serve`."""

    def __init__(self, encoder, world):
        self.encoder, self.world, self.prompts = encoder, world, encoder.prompts

    def serve(self, work):
        """Return work(encoder) on the main rank; the others embed what it asks for, and return {}.

        All ranks must call. An error is raised on all of them.
        """
        if self.world.size == 1:
            return work(self.encoder)
        if not self.world.is_main:
            while isinstance(request := self.world.from_main(None), tuple):
                self._share(*request)
            if request:
                raise request
            return {}
        try:
            results = work(self)
        except Exception as error:
            self.world.from_main(error)
            raise
        self.world.from_main(None)                     # the end
        return results

    def encode(self, texts, prompt=None):
        """Return unit vectors (N, D) float32; for the main rank, within `serve`."""
        self.world.from_main((texts, prompt))
        parts = self._share(texts, prompt)
        for part in parts:
            if isinstance(part, Exception):
                raise part
        vectors = np.empty((len(texts), self.encoder.dim), dtype=np.float32)
        for first, part in enumerate(parts):
            vectors[first::self.world.size] = part
        return vectors

    def _share(self, texts, prompt):
        """Embed this rank's texts; return all ranks' vectors, or errors, on the main rank."""
        try:
            part = self.encoder.encode(texts[self.world.rank::self.world.size], prompt=prompt)
        except Exception as error:
            part = error
        return self.world.gather_to_main(part)


class LexicalBaseline:
    """BM25 in an encoder's place: it ranks documents, but has no vectors."""

    def encode(self, texts, **_):
        """Raise ValueError: there are no vectors."""
        raise ValueError("BM25 has no vectors: it is for retrieval, mkqa and bitext")


class SentenceTransformerBaseline:
    """A sentence-transformers model, with the prompts that mteb would give it.

    Of its prompts the first that is there: TYPE-SIDE, TYPE, SIDE. Where none is, a query and a
    document get those of `encode_query` and `encode_document`, a symmetric task the model's
    default. trust_remote_code: whether a model's own code runs. Without it gte-Qwen2 becomes a
    causal Qwen2, and nothing says so: a model that brings code needs a word, ValueError otherwise.
    """

    def __init__(self, name, trust_remote_code=None):
        try:
            from sentence_transformers import SentenceTransformer
            from transformers import PretrainedConfig
        except ImportError:
            raise ImportError("a stock model needs: pip install -U sentence-transformers") from None
        config = {}
        with contextlib.suppress(OSError):             # not every model has a config.json
            config = PretrainedConfig.get_config_dict(name)[0]
        if trust_remote_code is None and config.get("auto_map"):
            raise ValueError(f"{name} brings code of its own: say whether that may run, by "
                             "--trust_remote_code=true or false")
        self.model = SentenceTransformer(name, trust_remote_code=bool(trust_remote_code))

    def prompt_of(self, kind, side=None):
        """Return (side, text of the prompt or None)."""
        keys, prompts = (f"{OUR_TYPES[kind]}-{side}", OUR_TYPES[kind], side), self.model.prompts
        return side, next((prompts[key] for key in keys if key in prompts), None)

    def encode(self, texts, prompt=None):
        """Return unit vectors (N, D) float32; prompt: what `prompt_of` returns."""
        side, text = prompt or (None, None)
        encode = {"query": self.model.encode_query, "document": self.model.encode_document}.get(
            side, self.model.encode)
        return np.float32(encode(texts, prompt=text, normalize_embeddings=True,     # or float16
                                 show_progress_bar=False))


class MTEBModel:
    """Hand an Embedder of a checkpoint to mteb 2: the four members that it asks of a model.

    dim: score the first dimensions alone. mteb keeps scores by name and revision: the run's folder
    and the hash of the checkpoint.
    """

    def __init__(self, encoder, dim=None):
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        self.encoder, self.dim, where = encoder, dim, encoder.checkpoint
        name = where.parent.name if (where / "manifest.json").is_file() else where.name
        revision = encoder.fingerprint()
        self.mteb_model_meta = ModelMeta.create_empty({
            "name": f"nanoconan/{name}", "framework": ["PyTorch"], "use_instructions": True,
            "revision": revision if dim is None else f"{revision}-{dim}",
            "max_tokens": encoder.max_len, "embed_dim": dim or encoder.dim,
            "similarity_fn_name": ScoringFunction.COSINE})

    def encode(self, inputs, *, task_metadata, prompt_type=None, batch_size=32, **_):
        """Embed the texts of mteb's batches, with the encoder's prompt for the type of task."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = prompt_of(self.encoder, task_metadata.type, prompt_type and prompt_type.value)
        return self.encoder.encode(texts, batch_size=batch_size, prompt=prompt,
                                   truncate_dim=self.dim)

    def similarity(self, left, right):
        """Return all cosines (N, M); a single vector counts as one row."""
        left, right = (torch.as_tensor(side).float() for side in (left, right))
        return torch.atleast_2d(left) @ torch.atleast_2d(right).T

    def similarity_pairwise(self, left, right):
        """Return the cosine of each row with its counterpart (N,)."""
        return (torch.as_tensor(left).float() * torch.as_tensor(right).float()).sum(-1)


def mteb_tasks(name):
    """Return (the tasks of one of mteb's tasks or benchmarks, whether it is a benchmark).

    Raises ValueError for an unknown name, ImportError without mteb.
    """
    try:
        import mteb
    except ImportError:
        raise ImportError("mteb is not installed: pip install mteb") from None
    with contextlib.suppress(KeyError):
        return list(mteb.get_benchmark(name).tasks), True
    try:
        return list(mteb.get_tasks(tasks=[name])), False
    except KeyError as error:
        reason = error.args[0].removeprefix("KeyError: ")
        raise ValueError(f"mteb has no such task or benchmark: {reason}") from None


def evaluate_mteb(encoder, name, folder, dims=()):
    """Run one of mteb's tasks or benchmarks -> {"mteb/<task>/<subset>/<metric>[:dim]": float}.

    A benchmark adds "mteb/<benchmark>/<type of task>/mean", and the means over "tasks" and over
    "types": a row of PAPER Table 1. mteb's own files go to `folder`; what is there already is not
    run again. Raises as `mteb_tasks` does.
    """
    chosen, is_benchmark = mteb_tasks(name)
    import mteb

    results, cache = {}, mteb.ResultCache(folder)
    for dim in (None, *dims):
        cut, model = "" if dim is None else f":{dim}", MTEBModel(encoder, dim)
        by_type = {}
        for task in chosen:
            done = mteb.evaluate(model, task, cache=cache).task_results[0]
            done = done.validate_and_filter_scores(task)       # the cache may hold more languages
            by_type.setdefault(task.metadata.type, []).append(done.get_score())
            results |= {key + cut: score for key, score in flat_scores(task, done.scores).items()}
        if is_benchmark:
            means = {kind: np.mean(scores) for kind, scores in by_type.items()}
            means["types"] = np.mean(list(means.values()))
            means["tasks"] = np.mean([score for scores in by_type.values() for score in scores])
            results |= {f"mteb/{name}/{k}/mean{cut}": float(mean) for k, mean in means.items()}
    return results


def flat_scores(task, scores):
    """Return {"mteb/<task>/<subset>/<metric>": float} of mteb's {split: [{main_score, ...}]}."""
    results = {}
    for split, rows in scores.items():
        for row in rows:
            subset = row["hf_subset"].replace("/", "_")
            if subset == "default":
                subset = split
            elif len(scores) > 1:
                subset = f"{split}-{subset}"
            key = f"mteb/{task.metadata.name}/{subset}/{task.metadata.main_score}"
            results[key] = float(row["main_score"])
    return results
