"""Stage 1 on a folder of public sets: next-token prediction over the text of all of them.

    python train.py config/real/embed_sup.py --root=FOLDER      # runs this stage, too
"""
stage = "pretrain"
out = "out/real"
aligned_start = 3.0
steps = 20
batch_size = 32                   # windows of 64 tokens
passage_len = 64
learning_rate = 1e-4

vocab_size = 64_000
n_embd = 4096
attention_dim = 128
ffn_dim = 32
embed_rank_power = 2.0
