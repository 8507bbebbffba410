"""For tests of several processes: forks of the test meet through gloo and train on made-up rows.

A fork has torch already; a process of its own would take seconds to import it.
"""
import json
import os
import random
import socket

import torch
import torch.multiprocessing as mp

import train
from engine import distributed

SMALL = ["--n_embd=32", "--n_head=4", "--n_kv_head=2", "--n_layer=2", "--ffn_dim=48",
         "--vocab_size=400", "--block_size=64", "--log_every=1", "--device=cpu", "--batch_size=12",
         "--dtype=float32", "--passage_len=32", "--query_len=16", "--n_negatives=3",
         "--pool_size=6", "--learning_rate=0.001", "--task_weights=retrieval:3,sts:2"]
KINDS = {"pretrain": ["text"], "sft": ["pairs"], "embed_weak": ["pairs"],
         "embed_sup": ["retrieval", "sts"]}
WORDS = "sort list tree graph node edge file open read write matrix vector random time".split()


def write_rows(folder):
    """Write rows about pairs of words, of unequal lengths: what is asked for is described."""
    rng, rows = random.Random(0), []
    for i in range(96):
        a, b = rng.sample(WORDS, 2)
        rows.append((f"{a} a {b}", f"This function {a}s the {b}, number {i}" + " or so" * (i % 5)))
    made = {
        "text": [{"text": f"{q}. {p}"} for q, p in rows],
        "pairs": [{"instruction": "Find", "input": q, "output": p} for q, p in rows],
        "retrieval": [{"query": q, "pos": [p]} for q, p in rows],
        "sts": [{"sentence1": q, "sentence2": rows[i // 2][0], "score": i % 5}
                for i, (q, _) in enumerate(rows)],
    }
    for kind, part in made.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def arguments(folder, stage, out, *more):
    """Return the command line of a stage on the rows in `folder`."""
    tokens = f"--text={folder / 'text.jsonl'}"             # the tokenizer's text, in every stage
    return [f"--stage={stage}", f"--out={out}", *SMALL, tokens, *more, "--previous=",
            *(f"--{kind}={folder / kind}.jsonl" for kind in KINDS[stage])]


def run(world, argv):
    """Train a stage from its command line."""
    return train.train(train.load_config(train.TrainConfig, argv), argv, world)


def free_port():
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(size, work, *args):
    """Call `work(world, *args)` on `size` ranks, forks of this process; an error there raises."""
    mp.start_processes(_rank, (size, free_port(), work, args), nprocs=size, start_method="fork")


def _rank(rank, size, port, work, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    world = distributed.start("cpu")
    work(world, *args)
    distributed.stop()
