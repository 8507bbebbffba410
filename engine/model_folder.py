"""Read a trained model from a folder: a checkpoint of train.py, or what tools/export.py wrote."""
import json
from pathlib import Path

from engine import checkpoint
from engine.jsonl import sha256_of

EXPORTED = "nanoconan.json"        # marks a folder that tools/export.py wrote


def read_model(path):
    """Return (folder, config as JSON, weights) of the newest checkpoint, or of an export.

    Every file is compared with its SHA-256 before it is read. Raises FileNotFoundError or
    ValueError with the path.
    """
    where = Path(path)
    if (where / EXPORTED).is_file():
        return where, *_read_exported(where)
    if not ((where / "manifest.json").is_file() and (where / "config.json").is_file()):
        where = checkpoint.latest(path)
    if where is None:
        inside = sorted({str(p.parents[1]) for p in Path(path).glob("*/step_*/manifest.json")})
        hint = f" ({', '.join(inside)})" if inside else ""
        raise FileNotFoundError(f"{path}: no checkpoint here; train.py writes them to OUT/STAGE"
                                f"{hint}")
    checkpoint.load(where, "tokenizer.tiktoken")
    return where, checkpoint.load(where, "config.json"), checkpoint.load(where, "model.pt")


def _read_exported(where):
    raw = (where / EXPORTED).read_bytes()
    try:
        for name, sha256 in json.loads(raw)["files"].items():
            if not checkpoint.FILE_NAME.fullmatch(name):       # none leads outside
                raise KeyError(name)
            if sha256_of(where / name) != sha256:
                raise ValueError(f"{where / name}: SHA-256 differs from {EXPORTED}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where / EXPORTED}: not as export.py wrote it: {error!r}") from None
    weights = read_safetensors(where / "model.safetensors")
    return raw, {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def read_safetensors(path):
    """Return {name: tensor} of a file; ValueError by its name if it is damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{path}: to read it, pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: damaged safetensors file: {error!r:.200}") from None
