stage = "embed_sup"
previous = "config/embed_weak.py"
steps = 100
batch_size = 16
passage_len = 64
dims = (64, 128, 256, 512)
