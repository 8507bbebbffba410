"""torch.compile of the blocks (`compile = True`): the same numbers, one compilation."""

import shutil

import pytest
import torch
import torch._dynamo as dynamo

from engine.distributed import compile_blocks
from mask import CAUSAL, FULL, MaskSpec
from model import Conan, ConanConfig

BATCHES = [[9, 30, 1, 28], [12, 12, 5], [40], [3, 3, 3, 20, 21], [64, 2]]


def tiny():
    return Conan(ConanConfig(vocab_size=61, n_layer=3, n_head=4, n_kv_head=2, n_embd=32,
                             ffn_dim=40, block_size=64)).init_weights(torch.Generator())


def step(model, lengths, mask, dtype):
    """Return the embeddings and all gradients of one step."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(ids, lengths, mask)
        (out * torch.arange(1, 33)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_and_compile_once(dtype, close, checkpointing):
    dynamo.reset()
    plain, compiled = tiny(), tiny()
    plain.checkpointing = compiled.checkpointing = checkpointing
    names = list(compiled.state_dict())
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == names
    dynamo.utils.counters.clear()
    graphs = []
    for number, lengths in enumerate(BATCHES):                 # every shape differs, alpha moves
        mask = [CAUSAL, MaskSpec(0.2), MaskSpec(0.4), MaskSpec(0.7, "col"), FULL][number]
        for a, b in zip(step(compiled, lengths, mask, dtype), step(plain, lengths, mask, dtype)):
            assert (a - b).norm() <= close * b.norm()
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    # before and after attention: two pieces, whatever the number of blocks, texts and tokens
    assert graphs[0] > 0 and set(graphs) == {graphs[0]} and graphs[0] <= 4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same():
    dynamo.reset()
    plain, compiled = tiny(), tiny()
    compile_blocks(compiled)
    for lengths in BATCHES[:2]:
        for a, b in zip(step(compiled, lengths, MaskSpec(0.4), "float32"),
                        step(plain, lengths, MaskSpec(0.4), "float32")):
            assert (a - b).norm() <= 1e-4 * b.norm()
