"""Stage 3, twice as wide: (title, content) pairs, InfoNCE, soft mask (PAPER Sec. 3.2).

    python train.py config/small/embed_weak.py

DEVIATES: no pair is dropped for a score below 0.4 (Sec. 3.1.2), as these pairs carry no score.
"""
stage = "embed_weak"
previous = "config/small/sft.py"
steps = 1500
batch_size = 128
passage_len = 64
learning_rate = 2e-3                # after 12M tokens better than 1e-3, on dev
