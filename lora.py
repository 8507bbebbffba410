"""Low-rank adapters: the other arm of PAPER Table 6 (LoRA r16 / r32 / r64 against all weights).

    python train.py config/embed_sup.py --lora_rank=16      # stages 3 and 4 through adapters

    add_lora(model, rank=16)                                # ready to train; the rest is frozen
    load_lora(model, checkpoint.load(PATH, "lora.pt"))      # trained ones, on the weights they knew
    merge(model)                                            # a plain model again

y = (W + alpha / r * B A) x. B starts at zero, so step 0 is the base model.
UNSPECIFIED: alpha and which matrices. Here alpha = 2 r, and all seven projections of a block; never
the embeddings or the norms.
The sum is formed once a pass, in float32, where W x + alpha / r * B (A x) would be two paths. So
fused projections, every attention path, bfloat16 and torch.compile need not know of it, and merging
changes no bit of an embedding. What it saves is the memory of gradients and optimizer, not time.

r rank, D and F as in model.py; a projection has `in` columns and `out` rows.
"""
import torch
import torch.nn as nn


class LoRALinear(nn.Linear):
    """A linear layer whose `weight` is W + alpha / r B A; the parameter of that name is still W.

    `add_lora` turns layers into this class and `merge` turns them back, in place: the parameters
    stay the same objects under the same names, so a state dict of the base loads as before.
    """

    @property
    def weight(self):
        """Return W + alpha / r B A, (out, in); under autocast too in the dtype of W."""
        w, scale = self._parameters["weight"], self.lora_alpha / len(self.lora_a)
        with torch.autocast(w.device.type, enabled=False):
            return torch.addmm(w, self.lora_b, self.lora_a, alpha=scale)


def adapted(model):
    """Return {name: layer} of the layers that have adapters."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, rank, alpha=None, generator=None):
    """Give every linear layer of a model adapters and freeze all else; return the model.

    A: (rank, in), from N(0, 1 / in), so that A x is about as large as x; B: (out, rank), zero.
    alpha: None takes 2 * rank. Raises ValueError for a rank below 1, or if there are some already.
    """
    if rank < 1 or adapted(model):
        raise ValueError(f"rank {rank} must be at least 1" if rank < 1 else
                         "the model has adapters already; merge them first")
    model.requires_grad_(False)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        w = linear.weight
        a = torch.randn(rank, w.shape[1], generator=generator, device="cpu") * w.shape[1] ** -0.5
        linear.lora_a = nn.Parameter(a.to(w))
        linear.lora_b = nn.Parameter(w.new_zeros(w.shape[0], rank))
        linear.lora_alpha = float(2 * rank if alpha is None else alpha)
        linear.__class__ = LoRALinear
    return model


@torch.no_grad()
def merge(model):
    """Put the adapters into the weights, take them away and unfreeze all; return the model."""
    for linear in adapted(model).values():
        merged = linear.weight
        linear.__class__ = nn.Linear
        linear.weight.copy_(merged)
        del linear.lora_a, linear.lora_b, linear.lora_alpha
    return model.requires_grad_(True)


@torch.no_grad()
def merged_state_dict(model):
    """Return the state dict that `merge` would leave, on the CPU; the model stays as it is."""
    state = {name: value.cpu() for name, value in model.state_dict().items()
             if not name.endswith((".lora_a", ".lora_b"))}
    return state | {f"{name}.weight": layer.weight.cpu() for name, layer in adapted(model).items()}


def lora_state_dict(model):
    """Return {"alpha": float, "adapters": {name: tensor on the CPU}}: all that was trained."""
    layers = adapted(model)
    return {"alpha": max(layer.lora_alpha for layer in layers.values()),
            "adapters": {f"{name}.{part}": getattr(layer, part).detach().cpu()
                         for name, layer in layers.items() for part in ("lora_a", "lora_b")}}


def load_lora(model, saved):
    """Give a plain model the adapters that `lora_state_dict` returned; return the model.

    It must have the weights on which they were trained. Raises ValueError if its shape is another;
    the model is then as it was.
    """
    given = {name: tuple(value.shape) for name, value in saved["adapters"].items()}
    rank = max((shape[0] for name, shape in given.items() if name.endswith(".lora_a")), default=0)
    add_lora(model, rank, saved["alpha"])
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if own != given:
        merge(model)                                        # B is still zero
        name = min(n for n in own.keys() | given.keys() if own.get(n) != given.get(n))
        raise ValueError(f"adapters of another model: {name} has shape {given.get(name)} in the "
                         f"file, {own.get(name)} here")
    model.load_state_dict(saved["adapters"], strict=False)
    return model
