"""Stage 2, twice as wide: the pairs as instruction, input and output (PAPER Sec. 3.1.1).

    python train.py config/small/sft.py
"""
stage = "sft"
previous = "config/small/pretrain.py"
steps = 30
batch_size = 64
passage_len = 128
learning_rate = 4e-4
