"""Let the language model of stages 1 and 2 write.

    python sample.py --checkpoint=out/pretrain --prompt="Return the"
    python sample.py --checkpoint=out/sft --instruction="Find" --prompt="Return the sum."

The model is causal here (alpha 0), whatever mask its stage ended with. Every new token is drawn
from the softmax of the last state against the tied embeddings, divided by a temperature. After an
embedding stage the same command shows what is left of the language model.
"""
import argparse

import torch

from configurator import run_command
from data import format_sft
from embed import Embedder
from mask import CAUSAL


@torch.no_grad()
def generate(model, tokenizer, prompt, n_tokens=80, temperature=0.7, seed=0):
    """Return the text that a model writes after `prompt`, up to its end-of-text or `n_tokens`.

    temperature 0 takes the most likely token each time. No cache of keys and values: each token
    costs a pass over the whole text, so that this stays one loop.
    """
    device = model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    start = len(ids)
    for _ in range(n_tokens):
        window = ids[-model.config.block_size:]
        hidden = model.hidden(torch.tensor(window, device=device), [len(window)], CAUSAL)
        logits = (hidden[-1] @ model.embed_tokens.weight.T).float().cpu()       # (V,)
        logits = logits[:tokenizer.vocab_size]
        if temperature < 1e-6:                     # 0, or no float32 can divide by it
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(0), 1,
                                          generator=generator))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def run(args):
    """Print the prompt, and what the model writes after it."""
    if not args.temperature >= 0:                      # nor what is no number
        raise ValueError(f"--temperature must not be negative, not {args.temperature}")
    if args.n_tokens < 1:
        raise ValueError(f"--n_tokens must be at least 1, not {args.n_tokens}")
    embedder = Embedder(args.checkpoint, dtype="float32")
    prompt = args.prompt if args.instruction is None else format_sft(args.instruction, args.prompt)
    print(prompt + generate(embedder.model, embedder.tokenizer, prompt, args.n_tokens,
                            args.temperature, args.seed))


def main():
    """Write on the command line; see the module docstring."""
    parser = argparse.ArgumentParser(description="let a trained model write")
    parser.add_argument("--checkpoint", default="out/pretrain",
                        help="folder of train.py (%(default)s)")
    parser.add_argument("--prompt", default="Return the", help="the text to continue (%(default)s)")
    parser.add_argument("--instruction", help="ask as stage 2 does: instruction, then the prompt")
    parser.add_argument("--n_tokens", type=int, default=80,
                        help="tokens to write at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="0: the most likely token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    args = parser.parse_args()
    run_command(lambda: run(args))


if __name__ == "__main__":
    main()
