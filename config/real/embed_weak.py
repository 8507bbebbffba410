"""Stage 3 on public sets: (title, content) pairs, InfoNCE, soft mask (PAPER Sec. 3.2).

    python train.py config/real/embed_weak.py

DEVIATES: no pair is dropped for a score below 0.4 (Sec. 3.1.2), as these pairs carry no score.
"""
stage = "embed_weak"
previous = "config/real/sft.py"
steps = 1000
batch_size = 128
passage_len = 128
learning_rate = 2e-3
