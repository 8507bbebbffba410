"""Stage 3 on a laptop: pairs, InfoNCE under the soft mask (PAPER Sec. 3.1.2, 3.2).

Documentation, its summary lines in 26 languages, and entries of the dictionary: a file a step, in
proportion to their rows (mixture.ensure_docs), so that a fifth of the steps are documentation.

    python train.py config/embed_weak.py      # about four minutes on two cores
"""
stage = "embed_weak"
previous = "config/sft.py"
steps = 900
batch_size = 256                   # pairs; at equal time better than 64, 128 and 512 (docs/log.md)
passage_len = 64
learning_rate = 4e-3
