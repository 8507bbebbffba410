"""Stage 3 on a folder of public sets: titles, questions and bitext under the soft mask.

    python train.py config/real/embed_sup.py --root=FOLDER      # runs this stage, too

A batch is taken from one set and one passage language, so that its negatives are alike.
"""
stage = "embed_weak"
previous = "config/real/sft.py"
out = "out/real"
steps = 2000
batch_size = 256
passage_len = 96
learning_rate = 2.5e-3
save_every = 250

vocab_size = 32_000
