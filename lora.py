"""Low-rank adapters: the other arm of PAPER Table 6 (LoRA r16 / r32 / r64 against all weights).

    python train.py config/embed_sup.py --lora_rank=16 --out=out/lora   # stages 3 and 4 by adapters

y = (W + 2 B A) x. B starts at zero, so step 0 is the base model.
UNSPECIFIED: alpha, stages and matrices. Here alpha = 2 r, a scale alpha / r of 2, on all seven
projections of a block, never on the embeddings or the norms. Stages 3 and 4 have an adapter each,
so together they change a weight by rank 2 r.
An adapter parametrises the weight: whoever reads `layer.weight` gets the sum, formed in float32. So
kernels, bfloat16 and torch.compile need not know of it. It saves the memory of gradients and
optimizer, not time.

r rank; a projection has `in` columns and `out` rows.
"""
import torch
import torch.nn as nn

SCALE = 2.0                        # alpha / r


class LoRALinear(nn.Linear):
    """A linear layer whose `weight` is W + 2 B A; the parameter of that name is still W.

    One class for all layers: torch.nn.utils.parametrize makes one for each, and torch.compile would
    then compile every block by itself.
    """

    @property
    def weight(self):
        """Return W + 2 B A, (out, in), in the dtype of W, under autocast too."""
        w = self._parameters["weight"]
        with torch.autocast(w.device.type, enabled=False):
            return torch.addmm(w, self.lora_b, self.lora_a, alpha=SCALE)


def add_lora(model, rank, generator=None):
    """Give every linear layer of a model an adapter and freeze all else; return the model.

    A: (rank, in), from N(0, 1 / in), so that A x is about as large as x. B: (out, rank), zero.
    Raises ValueError for a rank below 1, or if there are adapters.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if any(isinstance(layer, LoRALinear) for layer in layers):
        raise ValueError("the model has adapters already")
    model.requires_grad_(False)
    for layer in layers:
        w = layer.weight
        a = torch.randn(rank, w.shape[1], generator=generator, device="cpu") * w.shape[1] ** -0.5
        layer.lora_a = nn.Parameter(a.to(w))
        layer.lora_b = nn.Parameter(w.new_zeros(w.shape[0], rank))
        layer.__class__ = LoRALinear
    return model


@torch.no_grad()
def merged_state_dict(model):
    """Return the state dict of the plain model with the same outputs; the model stays as it is.

    All tensors are on the CPU.
    """
    state = {name: value.cpu() for name, value in model.state_dict().items()
             if not name.endswith((".lora_a", ".lora_b"))}
    return state | {f"{name}.weight": layer.weight.cpu() for name, layer in model.named_modules()
                    if isinstance(layer, LoRALinear)}
