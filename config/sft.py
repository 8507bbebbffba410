stage = "sft"
previous = "config/pretrain.py"
steps = 40
batch_size = 64
learning_rate = 1e-3
