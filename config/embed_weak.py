"""Stage 3 on a laptop: (title, content) pairs, InfoNCE under the soft mask (PAPER Sec. 3.2).

    python train.py config/embed_weak.py

DEVIATES: no pair is dropped for a score below 0.4 (Sec. 3.1.2), as these pairs carry no score.
"""
stage = "embed_weak"
previous = "config/sft.py"
steps = 600
batch_size = 128
passage_len = 64
learning_rate = 2e-3
