"""torch.compile of the blocks (`compile = True`): the same numbers, one compilation."""

import dataclasses
import shutil

import pytest
import torch
import torch._dynamo as dynamo

from engine import kernels
from engine.distributed import compile_blocks
from lora import add_lora
from mask import CAUSAL, FULL, MaskSpec
from model import Conan
from tiny import CONFIG, relative

BATCHES = [[9, 30, 1, 28], [12, 12, 5], [40], [3, 3, 3, 20, 21], [64, 2]]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                     reason="needs a GPU"))


def model_of(rank=0, **pick):
    shape = dataclasses.replace(CONFIG, n_layer=5)
    model = Conan(shape, kernels.pick("cpu", **pick)).init_weights(torch.Generator())
    if rank:
        add_lora(model, rank, generator=torch.Generator())
        for p in model.parameters():               # B has left zero
            p.data += 0.01 * p.requires_grad
    return model


def step(model, lengths, mask, dtype):
    """Return the embeddings and all gradients of one step."""
    generator, device = torch.Generator().manual_seed(sum(lengths)), model.norm.weight.device
    ids = torch.randint(0, 61, (sum(lengths),), generator=generator).to(device)
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(ids, lengths, mask)
        (out * torch.arange(1, 33, device=device)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype, checkpointing, rank", [
    ("float32", 0, 0), ("bfloat16", 1, 0),
    pytest.param("float32", 1, 3, marks=pytest.mark.slow)])          # adapters
def test_compiled_blocks_give_the_same_and_compile_once(dtype, checkpointing, rank):
    dynamo.reset()
    eager, compiled = model_of(rank), model_of(rank, compile=True)
    eager.checkpointing = compiled.checkpointing = checkpointing
    names = list(compiled.state_dict())
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == names
    dynamo.utils.counters.clear()
    graphs = []
    for number, lengths in enumerate(BATCHES):                 # every shape differs, alpha moves
        mask = [CAUSAL, MaskSpec(0.2), MaskSpec(0.4), MaskSpec(0.7, "col"), FULL][number]
        for a, b in zip(step(compiled, lengths, mask, dtype), step(eager, lengths, mask, dtype)):
            assert relative(a, b) <= (1e-5 if dtype == "float32" else 0.03)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    # before and after attention: two pieces, whatever the number of blocks, texts and tokens; with
    # adapters twice, since nothing before the first block takes a gradient
    assert graphs[0] > 0 and set(graphs) == {graphs[0]} and graphs[0] <= (8 if rank else 4)


def test_without_a_compiler_the_error_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O2")
    with pytest.raises(ValueError, match="C\\+\\+ compiler.*now '/nowhere/c\\+\\+ -O2'"):
        compile_blocks(model_of(compile=True))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_inductor_gives_the_same(device):
    dynamo.reset()
    eager, compiled = model_of().to(device), model_of(compile=True).to(device)
    compile_blocks(compiled)
    for lengths in BATCHES[:2]:
        for a, b in zip(step(compiled, lengths, MaskSpec(0.4), "float32"),
                        step(eager, lengths, MaskSpec(0.4), "float32")):
            assert relative(a, b) <= 1e-4
