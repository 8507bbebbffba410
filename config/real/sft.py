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

vocab_size = 32_000
n_embd = 2048
