"""Stage 1 on a laptop: next-token prediction over whole docstrings (PAPER Sec. 3.1.1).

    python train.py config/pretrain.py
"""
stage = "pretrain"
steps = 1200
batch_size = 16                    # windows of 256 tokens
passage_len = 256
learning_rate = 2e-3
warmup = 0.1
final_lr = 1.0                     # constant after the warm-up: the paper names no decay
beta2 = 0.95
