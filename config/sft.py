"""Stage 2 on a laptop: the pairs as instruction, input and output (PAPER Sec. 3.1.1).

    python train.py config/sft.py             # a quarter of a minute on two cores
"""
stage = "sft"
previous = "config/pretrain.py"
steps = 10
batch_size = 64
passage_len = 64
learning_rate = 2e-5
