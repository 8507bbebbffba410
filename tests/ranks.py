"""What tests train: made-up rows, a tiny model on them, runs that die, and several processes.

A process of its own takes seconds to import torch. Tests with several ranks are forks of the test,
which meet through gloo.
"""
import contextlib
import dataclasses
import gzip
import json
import os
import random
import resource
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import train
from data import PROMPTS
from engine import checkpoint, distributed
from engine import run as runs
from mask import FULL
from model import Conan, ConanConfig

ROOT = Path(train.__file__).parent
STEPS = 6                              # of a stage
WORDS = "sort list tree graph node edge file open read write matrix vector random time".split()
SMALL = ["--n_embd=32", "--n_head=4", "--n_kv_head=2", "--n_layer=2", "--ffn_dim=48",
         "--vocab_size=350", "--block_size=64", "--log_every=1", "--device=cpu",
         "--dtype=float32"]
STAGE = f"""steps = {STEPS}
seed = 1
batch_size = 12
passage_len = 32
query_len = 16
n_negatives = 3
pool_size = 6
task_weights = {{"retrieval": 3, "classification": 2, "sts": 2}}
"""
KINDS = {"pretrain": ["text"], "sft": ["pairs"], "embed_weak": ["pairs"],
         "embed_sup": ["retrieval", "classification", "sts"]}
CLOCK = ("tokens_per_second", "data_share")        # what a log line measures by the clock


# ---------------------------------------------------------------- rows, settings, models

def write_lines(path, rows):
    """Write rows (dicts) as JSONL, packed where the name ends in .gz; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_rows(folder):
    """Write rows about pairs of words, a collection of them, and a config file for each stage.

    What is asked for is what is described; texts are of unequal lengths.
    """
    rng, rows = random.Random(0), []
    for i in range(96):
        a, b = rng.sample(WORDS, 2)
        rows.append((f"{a} a {b}", f"This function {a}s the {b}, number {i}" + " or so" * (i % 5)))
    write_lines(folder / "text.jsonl", [{"text": f"{q}. {p}"} for q, p in rows])
    write_lines(folder / "pairs.jsonl",
                [{"instruction": "Find", "input": q, "output": p} for q, p in rows])
    write_lines(folder / "retrieval.jsonl",            # two easy negatives each: DHNM acts on them
                [{"query": q, "pos": [p], "neg": [f"{i} 98 76", f"54 {i} 32"]}
                 for i, (q, p) in enumerate(rows[:24])])
    write_lines(folder / "classification.jsonl",
                [{"query": p, "pos": q.split()[0],
                  "neg": [w for w in WORDS if w != q.split()[0]][:5]} for q, p in rows])
    write_lines(folder / "sts.jsonl",
                [{"sentence1": q, "sentence2": rows[i // 2][0], "score": i % 5}
                 for i, (q, _) in enumerate(rows)])
    write_collection(folder / "little" / "test", [q for q, _ in rows[:20]],
                     [p for _, p in rows[:20]])
    for stage, before in zip(train.STAGES, (None, *train.STAGES)):
        previous = f"previous = {str(folder / f'{before}.py')!r}\n" if before else ""
        (folder / f"{stage}.py").write_text(f'stage = "{stage}"\n{STAGE}{previous}')
    return folder


def write_collection(folder, queries, documents):
    """Write a retrieval collection in which document i answers query i; return its folder."""
    for name, texts in (("queries", queries), ("corpus", documents)):
        write_lines(folder / f"{name}.jsonl",
                    [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    (folder / "qrels.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(len(queries))))
    return folder


def arguments(folder, stage, out, *more):
    """Return the command line of one stage, from random weights, on the rows in `folder`."""
    tokens = f"--text={folder / 'text.jsonl'}"             # the tokenizer's text, in every stage
    return [str(folder / f"{stage}.py"), f"--out={out}", *SMALL, tokens,
            *(f"--{kind}={folder / kind}.jsonl" for kind in KINDS[stage]), "--previous=", *more]


def chain_arguments(folder, stage, out, *more):
    """Return the command line of a stage and all before it, scored on the little collection."""
    kinds = dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds)
    return [str(folder / f"{stage}.py"), f"--out={out}", *SMALL,
            *(f"--{kind}={folder / kind}.jsonl" for kind in kinds),
            f"--evaluate={folder / 'little' / 'test'}", *more]


def config(argv):
    """Return the `TrainConfig` of the last stage of a command line."""
    return runs.chain(train.TrainConfig, argv)[-1]


def tiny_config(stage="embed_sup", **changed):
    """Return a `TrainConfig` of a tiny model for the tokenizer of conftest.py."""
    return train.TrainConfig(**{**dict(
        stage=stage, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, ffn_dim=8, vocab_size=285,
        block_size=32, passage_len=16, query_len=8, steps=4, batch_size=2, n_negatives=2,
        device="cpu", dtype="float32"), **changed})


def tiny_model(std=0.02, seed=0, **changed):
    """Return a model of two layers of 32, and 50 tokens, drawn from N(0, std)."""
    shape = dict(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48,
                 block_size=64)
    generator = torch.Generator().manual_seed(seed)
    model = Conan(ConanConfig(**{**shape, **changed}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std, mean=1.0 if p.dim() == 1 else 0.0, generator=generator)
    return model


def write_run(folder, tokenizer, seed=0, **meta):
    """Write a run of train.py with random weights, as an embedder reads it; return its folder."""
    shape = ConanConfig(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, ffn_dim=16,
                        block_size=64)
    model = Conan(shape).init_weights(torch.Generator().manual_seed(seed))
    meta = {"model": dataclasses.asdict(shape), "mask": dataclasses.asdict(FULL),
            "train": {"dims": [4]}, "passage_len": 64, "step": 3, "prompts": PROMPTS, **meta}
    checkpoint.save(folder, 3, {"model.pt": model.state_dict(), "config.json": json.dumps(meta),
                                "tokenizer.tiktoken": tokenizer.to_bytes()})
    return folder


# ---------------------------------------------------------------- runs, and what they leave

def run(world, argv, before=None):
    """Train the last stage of a command line, that one alone."""
    return train.train(config(argv), world, before)


@contextlib.contextmanager
def step_loss_replaced(replacement):
    """Put `replacement(real, model, batch, cfg, step)` in the place of train.step_loss."""
    real = train.step_loss
    train.step_loss = lambda *args: replacement(real, *args)
    try:
        yield
    finally:
        train.step_loss = real


def die_at(step, train_it):
    """Call `train_it()` and fall over inside step number `step`, as a killed run does.

    A run that never gets to that step ends as it should.
    """
    def dies(real, model, batch, cfg, now):
        if now == step:
            raise KeyboardInterrupt
        return real(model, batch, cfg, now)
    with step_loss_replaced(dies), contextlib.suppress(KeyboardInterrupt):
        train_it()


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond `size` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def log(out, stage):
    """Return {step: its log line}, without what the clock measured; each step stands there once."""
    lines = [json.loads(line) for line in open(Path(out) / stage / "log.jsonl")]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCK} for line in lines}


def state_of(out, stage, name="model.pt"):
    """Return a file of a stage's newest checkpoint: its weights, or trainer.pt."""
    return checkpoint.load(checkpoint.latest(Path(out) / stage), name)


def meta_of(out, stage):
    """Return the config.json of a stage's newest checkpoint."""
    return runs.read_meta(checkpoint.latest(Path(out) / stage))


def assert_equal(a, b, close=None, where=""):
    """Compare nested tensors and values bit for bit, or with `close` (rtol, atol)."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        same = torch.allclose(a, b, *close, equal_nan=True) if close else \
            torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))    # NaN equals NaN
        assert same, (where, float((a.double() - b.double()).abs().max()))
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], close, f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, close, f"{where}/{i}")
    else:
        assert type(a) is type(b) and a == b, where


def assert_same_run(one, other, stage):
    """Two runs of a stage have the same log, weights, optimizer state, counters and pools."""
    assert log(one, stage) == log(other, stage)
    for name in ("model.pt", "trainer.pt"):
        assert_equal(state_of(one, stage, name), state_of(other, stage, name), where=name)


def stages_before(stage, source, out):
    """Give the folder `out` what lay there when the stage began; return it."""
    out.mkdir(exist_ok=True)
    for path in [*source.glob("tokenizer-*"), *source.glob("tokens-*"),
                 *(source / before for before in train.STAGES[:train.STAGES.index(stage)])]:
        (out / path.name).symlink_to(path)
    return out


# ---------------------------------------------------------------- several processes

def free_port():
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def needs_no_gpu():
    """Skip a test of forks where a GPU is seen: there torch refuses backward passes in a fork."""
    if torch.cuda.is_available():
        pytest.skip("forks: run CUDA_VISIBLE_DEVICES= pytest")


def on_ranks(size, work, *args):
    """Call `work(world, *args)` on `size` ranks, forks of this process; an error there raises."""
    needs_no_gpu()
    mp.start_processes(_rank, (size, free_port(), work, args), nprocs=size, start_method="fork")


def _rank(rank, size, port, work, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    world = distributed.start("cpu")
    work(world, *args)
    distributed.stop()
