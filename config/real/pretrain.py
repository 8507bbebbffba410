"""Stage 1 on public sets: next-token prediction over documents (PAPER Sec. 3.1.1).

    python train.py config/real/pretrain.py
"""
stage = "pretrain"
out = "out/real"
data = "out/real/sets"             # python -m tools.sets --root=FOLDER --out=out/real/sets
vocab_size = 16_384                # 36 languages share it
steps = 2000                       # 8.2M tokens
batch_size = 16                    # windows of 256 tokens
passage_len = 256
learning_rate = 2e-3
warmup = 0.1
final_lr = 1.0                     # constant after the warm-up: the paper names no decay
beta2 = 0.95
n_embd = 256                       # twice the default's width
n_head = 4
n_kv_head = 2
ffn_dim = 768
