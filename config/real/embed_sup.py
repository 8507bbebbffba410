"""Stage 4 on a folder of public sets: retrieval, CLR by professional translations, classes, STS.

    python train.py config/real/embed_sup.py --root=FOLDER      # all four stages: see sets.py

What came of it with two seeds: results/real.json, real_seed1.json; what else was tried: docs/log.md.
"""
stage = "embed_sup"
previous = "config/real/embed_weak.py"
out = "out/real"
steps = 60
batch_size = 48
task_weights = {"retrieval": 3, "clr": 4, "classification": 0.5, "sts": 1}
passage_len = 256
n_negatives = 3
learning_rate = 1.5e-4
dims = (64, 128, 256, 512, 1024, 2048, 4096)
save_every = 30

vocab_size = 64_000
n_embd = 4096
attention_dim = 128
ffn_dim = 32
embed_rank_power = 2.0
