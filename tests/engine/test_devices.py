"""The NPU's stand-in tests, in a process of their own.

torch cannot give the name of its private backend back once it is called "npu", and then every
backward pass of the same process asks for the module.
"""
import subprocess
import sys
from pathlib import Path


def test_the_npu_code_path_with_a_stand_in_module():
    path = Path(__file__).with_name("npu_stand_in.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400,
                         cwd=path.parent.parent.parent)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
