"""Training on real cards: all four stages as on a CPU, and several cards as one.

Forks cannot use a card, so these runs are processes of their own. They are skipped where there is
no card.
"""
import os
import subprocess
import sys

import pytest
import torch

import train
from ranks import ROOT, STEPS, chain_arguments, log

CARDS = torch.cuda.device_count()


def losses(rows, out, *more, ranks=1):
    """Train all stages by the command line; return the loss of each step, stage after stage."""
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone",
                                      f"--nproc_per_node={ranks}"]
    argv = [sys.executable, *torchrun, ROOT / "train.py",
            *chain_arguments(rows, "embed_sup", out, *more)]
    done = subprocess.run(list(map(str, argv)), cwd=rows, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [log(out, stage)[step + 1]["loss"] for stage in train.STAGES for step in range(STEPS)]


@pytest.fixture(scope="module")
def on_cpu(rows, tmp_path_factory):
    return losses(rows, tmp_path_factory.mktemp("cpu"))


@pytest.mark.skipif(CARDS < 1, reason="needs a GPU")
@pytest.mark.parametrize("options", [
    ["--dtype=float32"], ["--dtype=bfloat16"], ["--dtype=bfloat16", "--micro_batch_size=5"],
    ["--dtype=bfloat16", "--checkpointing=1"], ["--dtype=bfloat16", "--compile=true"]], ids=str)
def test_a_card_trains_as_a_cpu_does(rows, on_cpu, tmp_path, options):
    close = 1e-3 if options == ["--dtype=float32"] else 0.05
    assert losses(rows, tmp_path, "--device=cuda", *options) == pytest.approx(on_cpu, rel=close)


@pytest.mark.skipif(CARDS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp"])
def test_two_cards_train_as_one_does(rows, on_cpu, tmp_path, mode):
    two = losses(rows, tmp_path, "--device=cuda", f"--parallel={mode}", ranks=2)
    assert two == pytest.approx(on_cpu, rel=1e-3)
