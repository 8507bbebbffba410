stage = "embed_weak"
previous = "config/sft.py"
steps = 250
batch_size = 128
learning_rate = 2e-3
passage_len = 64
