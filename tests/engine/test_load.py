"""Much data in little memory; each measurement is a process of its own, and its peak is asked for.

    pytest -m slow tests/engine/test_load.py --record=results/trust.json
"""
import json
import shutil
import subprocess
import sys

import pytest

from ranks import ROOT

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")]
BEGIN = """
import json, sys, time
import numpy as np
import torch
sys.path.insert(0, sys.argv[1])
import data
from embed import Embedder
from engine.mining import mine
from engine import kernels, memory
from engine.order import shuffled
from mask import FULL
from model import Conan, ConanConfig
from tokenizer import Tokenizer

torch.set_num_threads(1)

def peak():                                        # of this process, in MB; ru_maxrss would start
    return memory.held() * 1e3                     # at what its parent held

def tiny(block_size):
    tokenizer = Tokenizer.train(["the quick brown fox number 0123456789"] * 3, 285)
    model = Conan(ConanConfig(vocab_size=285, n_layer=1, n_head=2, n_kv_head=1, n_embd=16,
                              ffn_dim=16, block_size=block_size), ops=kernels.pick("cpu"))
    model.init_weights()
    return Embedder.of(model.eval(), tokenizer, FULL, block_size)
"""


def measure(code, *args, folder=None):
    """Run code in a fresh process; return what its last line prints, parsed."""
    done = subprocess.run([sys.executable, "-c", BEGIN + code, str(ROOT), *map(str, args)],
                          capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_million_short_texts(record):
    """Peak memory is that of the vectors and of one part, not of the tokens of all texts."""
    found = measure("""
class Texts:                                       # made when they are asked for
    def __len__(self):
        return 1_000_000
    def __getitem__(self, part):
        if isinstance(part, slice):
            return [f"fox {i}" for i in range(*part.indices(len(self)))]
        if part >= len(self):
            raise IndexError
        return f"fox {part}"

embedder = tiny(32)
embedder.encode(Texts()[:40_000])
before = peak()
vectors = embedder.encode(Texts())
again = embedder.encode(Texts()[999_990:1_000_000])
print(json.dumps({"grown": peak() - before, "shape": vectors.shape,
                  "same": bool(np.allclose(vectors[-10:], again, atol=1e-5)),
                  "finite": bool(np.isfinite(vectors).all())}))
""")
    record["a million short texts, MB beyond the start"] = round(found["grown"])
    assert found["shape"] == [1_000_000, 16] and found["same"] and found["finite"]
    assert found["grown"] < 64 + 100, f"{found['grown']:.0f} MB for 64 MB of vectors"


def test_a_text_of_32768_tokens(record):
    """Attention at alpha 1 and alpha 0 holds no T x T matrix: that would be 4.3 GB a head."""
    found = measure("""
from mask import MaskSpec
embedder = tiny(32_768)
text = "0 1 2 3 4 5 6 7 8 9 " * 4000
assert len(embedder.tokenizer.encode(text)) > 32_768
embedder.encode([text[:2000]])
before, found = peak(), {}
for alpha in (1.0, 0.0):
    embedder.mask = MaskSpec(alpha)
    vector = embedder.encode([text, "fox"])
    found[str(alpha)] = bool(np.isfinite(vector).all()) and vector.shape == (2, 16)
print(json.dumps(found | {"grown": peak() - before}))
""")
    record["one text of 32,768 tokens, MB beyond the start"] = round(found["grown"])
    assert found["1.0"] and found["0.0"]
    assert found["grown"] < 400, f"{found['grown']:.0f} MB"


def test_mining_over_200_000_passages(record):
    """All scores would be 160 GB for as many queries; a chunk of queries is held at a time."""
    found = measure("""
rng = np.random.default_rng(0)
passages = rng.standard_normal((200_000, 16), dtype=np.float32)
passages /= np.linalg.norm(passages, axis=1, keepdims=True)
queries, before = passages[:1000], peak()
pools, _ = mine(queries, passages, [[q] for q in range(1000)], depth=50)
scores = queries[:3] @ passages.T
right = np.argsort(-scores, axis=1, kind="stable")[:, 1:51]
print(json.dumps({"grown": peak() - before, "shape": pools.shape,
                  "right": (pools[:3] == right).mean(), "own": bool((pools[:, :] ==
                  np.arange(1000)[:, None]).any())}))
""")
    record["mining over 200,000 passages, MB beyond the start"] = round(found["grown"])
    assert found["shape"] == [1000, 50] and found["right"] > 0.99 and not found["own"]
    assert found["grown"] < 500, f"{found['grown']:.0f} MB; 1,000 x 200,000 scores are 800"


def test_a_large_file_needs_no_more_memory_than_a_small_one(tmp_path):
    """Index, random access and token stream of a file, and of one four times as large."""
    code = """
path, rows = sys.argv[2], int(sys.argv[3])
with open(path, "w") as file:
    for i in range(rows):
        file.write(json.dumps({"text": f"row {i} " + "the quick brown fox " * 2}) + "\\n")
tokenizer, before = tiny(32).tokenizer, peak()
found = data.open_rows([path], "text", "cache")
order = shuffled(np.arange(3000), len(found), 0)
assert all(found[int(i)].startswith(f"row {i} ") for i in order)
stream = data.TokenStream(found, tokenizer, path + ".bin")
assert stream.windows(np.arange(100), 64).shape == (100, 65)
print(json.dumps({"grown": peak() - before, "rows": len(found)}))
"""
    sizes = [180_000, 720_000]                                 # about 12 and 50 MB
    grown = []
    for rows in sizes:
        found = measure(code, tmp_path / f"{rows}.jsonl", rows, folder=tmp_path)
        assert found["rows"] == rows
        grown.append(found["grown"])
        (tmp_path / f"{rows}.jsonl").unlink()
    assert grown[1] < grown[0] + 40 and grown[1] < 200, grown  # file pages in use count as well


TRAIN = """
import train
path, repeats = sys.argv[2], int(sys.argv[3])
words = "sort list tree graph node edge file open read write".split()
block = "".join(json.dumps({"input": f"{words[i % 10]} {i}", "output": f"number {i}: " + " ".join(
    words[(i + j) % 10] for j in range(2000))}) + "\\n" for i in range(2000))   # 20 MB
with open(path, "w") as file:
    for _ in range(repeats):
        file.write(block)
with open("text.jsonl", "w") as file:
    for i in range(200):
        file.write(json.dumps({"text": " ".join(words) + f" {i}"}) + "\\n")
for stage in ("sft", "embed_weak"):
    train.main([f"--stage={stage}", f"--pairs={path}", "--text=text.jsonl", "--previous=",
                "--n_embd=16", "--n_head=2", "--n_kv_head=1", "--ffn_dim=16", "--vocab_size=300",
                "--block_size=64", "--passage_len=32", "--query_len=16", "--steps=10",
                "--batch_size=8", "--device=cpu", "--dtype=float32", f"--out=out{repeats}"])
print(json.dumps({"peak": peak(), "bytes": len(block) * repeats}))
"""


def test_training_on_5_gb_takes_the_memory_of_20_mb(tmp_path, record):
    """Stages 2 and 3 read their rows by number, through an index of byte offsets on disk."""
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("10 GB of disk are needed")
    found = []
    for repeats in (1, 260):
        path = tmp_path / f"{repeats}.jsonl"
        found.append(measure(TRAIN, path, repeats, folder=tmp_path))
        path.unlink()
    small, large = found
    record["peak MB of training on a JSONL"] = {
        f"{f['bytes'] / 1e9:.2f} GB": round(f["peak"]) for f in found}
    assert large["bytes"] > 5e9 and large["peak"] < small["peak"] + 60, found
