"""Stage 3 on a laptop: the same pairs, InfoNCE under the soft mask (PAPER Sec. 3.1.2, 3.2).

    python train.py config/embed_weak.py      # three to four minutes on two cores
"""
stage = "embed_weak"
previous = "config/sft.py"
steps = 320
batch_size = 256                   # pairs; at equal time better than 64, 128 and 512 (LOG.md)
passage_len = 64
learning_rate = 1.5e-3
