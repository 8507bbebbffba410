"""Stage 1 on a laptop: next-token prediction over whole docstrings (PAPER Sec. 3.1.1).

    python train.py config/pretrain.py        # a minute on two cores
"""
stage = "pretrain"
steps = 20
batch_size = 64                    # windows of 64 tokens
passage_len = 64
learning_rate = 1e-4
