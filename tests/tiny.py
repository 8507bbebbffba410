"""One tiny model, masks of every kind and some texts, for tests of the model and its kernels."""
import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses import false_negatives, info_nce, own_positives
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig

CONFIG = ConanConfig(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=40,
                     block_size=512)
MASKS = {"causal": CAUSAL, "full": FULL, "soft-row": MaskSpec(0.3),
         "soft-col": MaskSpec(0.3, "col"), "nearly-full": MaskSpec(0.9),
         "logits": MaskSpec(0.3, apply="logits"), "logits-0": MaskSpec(0.0, apply="logits")}


def tiny(ops=None, **changes):
    """Return a model with weights large enough for attention to be far from uniform."""
    model = Conan(dataclasses.replace(CONFIG, **changes), ops)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2, generator=generator)
    return model


def texts_of(*lengths):
    """Return random token ids of texts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 61, (n,), generator=generator) for n in lengths]


def relative(a, b):
    """Return the size of a - b in units of b."""
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


def nce(query, positive, negatives=None, *, temperature, **ids):
    """InfoNCE without the false negatives of some ids; an id that is left out equals nothing."""
    absent = -3 - own_positives(len(query), query.device)
    ids = {"query_ids": absent, "positive_ids": absent} | ids
    if negatives is not None:
        ids = {"negative_ids": torch.full(negatives.shape[:2], -2)} | ids
    return info_nce(query, positive, negatives, false_negatives(**ids), temperature=temperature)


class Largest(TorchDispatchMode):
    """The largest number of elements of a CPU tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x) and x.device.type == "cpu":
                self.numel = max(self.numel, x.numel())
        return out
