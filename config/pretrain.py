stage = "pretrain"
steps = 60
batch_size = 64
passage_len = 128
learning_rate = 2e-3
