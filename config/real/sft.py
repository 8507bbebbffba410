"""Stage 2 on a folder of public sets: questions, titles and translations as instruction text.

    python train.py config/real/embed_sup.py --root=FOLDER      # runs this stage, too
"""
stage = "sft"
previous = "config/real/pretrain.py"
out = "out/real"
steps = 10
batch_size = 32
passage_len = 64
learning_rate = 2e-5

vocab_size = 64_000
n_embd = 4096
attention_dim = 128
ffn_dim = 32
embed_rank_power = 2.0
