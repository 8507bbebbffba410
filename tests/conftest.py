"""What every test gets: one thread and a fixed seed, so that no test depends on another's order.

`--record=FILE` adds what the tests have measured (fixture `record`) to a JSON file.
"""

import json
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="add what tests have measured to this file")


@pytest.fixture(scope="session")
def record(request):
    """A dict for measured numbers; what is in it at the end goes to the file of `--record`."""
    found = {}
    yield found
    path = request.config.getoption("--record")
    if path and found:
        before = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
        Path(path).write_text(json.dumps(before | found, indent=1) + "\n")


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
