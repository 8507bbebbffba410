"""What every test gets: one thread and a fixed seed, so that no test depends on another's order.

Shared here: a tokenizer, made-up rows in a folder of their own, and `record`: `--record=FILE` adds
what the tests have measured to a JSON file.
"""
import gc
import json
import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="add what tests have measured to this file")


def pytest_collection_finish():
    """Take what is imported out of the collector's sight: it would visit, and a fork copy, it.

    One thread for the fixtures of a module, too: they come before those of a test.
    """
    gc.freeze()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def record(request):
    """A dict for measured numbers; what is in it at the end goes to the file of `--record`."""
    numbers = {}
    yield numbers
    path = request.config.getoption("--record")
    if path and numbers:
        before = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
        Path(path).write_text(json.dumps(before | numbers, indent=1) + "\n")


@pytest.fixture(autouse=True)
def one_thread_a_seed_and_the_cpu(monkeypatch):
    """A test that wants a card names it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr("embed.accelerator", lambda: "cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 285 entries that knows one sentence about a fox."""
    from tokenizer import Tokenizer
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 285)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of ranks.write_rows, in a folder that is the current one; caches go to out/cache."""
    from ranks import write_rows
    before, folder = os.getcwd(), write_rows(tmp_path_factory.mktemp("rows"))
    os.chdir(folder)
    yield folder
    os.chdir(before)
