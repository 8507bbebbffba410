"""Stage 2 on public sets: the pairs as instruction, input and output (PAPER Sec. 3.1.1).

    python train.py config/real/sft.py
"""
stage = "sft"
previous = "config/real/pretrain.py"
steps = 30
batch_size = 64
passage_len = 128
learning_rate = 4e-4
