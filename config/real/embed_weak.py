"""Stage 3 on public sets: (title, content) pairs, InfoNCE, soft mask (PAPER Sec. 3.2).

    python train.py config/real/embed_weak.py
"""
stage = "embed_weak"
previous = "config/real/sft.py"
steps = 1000
batch_size = 128
passage_len = 128
learning_rate = 2e-3
