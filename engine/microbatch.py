"""A contrastive step over a batch that is too large for one pass, with the exact gradient.

Gradient accumulation is *not* a larger contrastive batch: each micro batch would see its own
candidates only. Two passes are exact, without dropout, which this project does not have:

    pass 1    embed every chunk without a graph; the loss gives d loss / d embedding
    pass 2    embed each chunk again, and send its part of that gradient back through it

The price is one more forward pass, a third of the time; memory is that of one chunk.
"""
import contextlib

import torch


def backward(loss):
    """Call loss.backward() outside of autocast: what ran in float32 has its gradient in float32."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def two_pass(encode, chunks, loss_fn, no_sync=contextlib.nullcontext):
    """Backpropagate a loss over the embeddings of all chunks; return (loss detached, rest).

    encode: chunk -> (b, D); loss_fn: (sum of b, D) float32 -> (loss, rest). `no_sync` opens a
    context in which backward synchronises no gradients between ranks: it wraps all chunks but the
    last. A single chunk takes one pass.
    """
    if len(chunks) == 1:
        loss, rest = loss_fn(encode(chunks[0]).float())
        backward(loss)
        return loss.detach(), rest
    with torch.no_grad():
        parts = [encode(chunk) for chunk in chunks]
    whole = torch.cat(parts).float().requires_grad_()
    loss, rest = loss_fn(whole)
    backward(loss)
    grads = whole.grad.split([len(part) for part in parts])
    for i, (chunk, grad) in enumerate(zip(chunks, grads)):
        with no_sync() if i < len(chunks) - 1 else contextlib.nullcontext():
            backward((encode(chunk).float() * grad).sum())
    return loss.detach(), rest
