"""Stage 1, twice as wide: next-token prediction over whole docstrings (PAPER Sec. 3.1.1).

    python train.py config/small/pretrain.py
"""
stage = "pretrain"
out = "out/small"
steps = 3000
batch_size = 16                    # windows of 256 tokens
passage_len = 256
learning_rate = 2e-3
warmup = 0.2
final_lr = 1.0                     # constant after the warm-up: the paper names no decay
beta2 = 0.95
n_embd = 256                       # twice the default's width
n_head = 4
n_kv_head = 2
ffn_dim = 768
