"""Stage 3 on a laptop: (title, content) pairs, InfoNCE under the soft mask (PAPER Sec. 3.2).

    python train.py config/embed_weak.py
"""
stage = "embed_weak"
previous = "config/sft.py"
steps = 600
batch_size = 128
passage_len = 64
learning_rate = 2e-3
