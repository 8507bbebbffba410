"""Stage 3 on a folder of public sets: (title, content) pairs, InfoNCE under the soft mask (PAPER Sec. 3.2).

    python train.py config/real/embed_weak.py
"""
stage = "embed_weak"
previous = "config/real/sft.py"
steps = 300
batch_size = 128
passage_len = 64
learning_rate = 1e-3
