"""Low-rank adapters: the other arm of PAPER Table 6 (LoRA r16 / r32 / r64 against all weights).

    python train.py config/embed_sup.py --lora_rank=16      # stages 3 and 4 by adapters alone

y = (W + alpha / r B A) x. B starts at zero, so step 0 is the base model.
UNSPECIFIED: alpha and which matrices. Here alpha = 2 r, on all seven projections of a block, never
on the embeddings or the norms.
An adapter is a parametrisation: whoever reads `layer.weight` gets the sum, formed in float32. So
kernels, bfloat16 and torch.compile need not know of it. It saves the memory of gradients and
optimizer, not time.

r rank; a projection has `in` columns and `out` rows.
"""
import torch
import torch.nn as nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W (out, in) -> W + alpha / r B A, with A (r, in) and B (out, r)."""

    def __init__(self, weight, rank, alpha, generator):
        super().__init__()
        a = torch.randn(rank, weight.shape[1], generator=generator, device="cpu")
        self.a = nn.Parameter((a * weight.shape[1] ** -0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_lora(model, rank, alpha=None, generator=None):
    """Give every linear layer of a model an adapter and freeze all else; return the model.

    A is drawn from N(0, 1 / in), so that A x is about as large as x; B is zero. alpha: None takes
    2 * rank. Raises ValueError for a rank below 1 or a model that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if any(map(parametrize.is_parametrized, layers)):
        raise ValueError("the model has adapters already")
    model.requires_grad_(False)
    for layer in layers:
        adapter = LowRank(layer.weight, rank, 2 * rank if alpha is None else alpha, generator)
        parametrize.register_parametrization(layer, "weight", adapter)
    return model


@torch.no_grad()
def merged_state_dict(model):
    """Return the state dict of the plain model with the same outputs, on the CPU.

    The model stays as it is.
    """
    state = {}
    for name, value in model.state_dict().items():
        layer, is_adapted, part = name.partition(".parametrizations.weight.")
        if not is_adapted:
            state[name] = value.cpu()
        elif part == "original":
            state[f"{layer}.weight"] = model.get_submodule(layer).weight.cpu()
    return state
