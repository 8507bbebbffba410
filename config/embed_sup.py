"""Stage 4 on a laptop: retrieval, CLR, classes and STS; DHNM and MRL (PAPER Sec. 3.1.2 to 3.4).

    torchrun train.py config/embed_sup.py     # all four stages
"""
stage = "embed_sup"
previous = "config/embed_weak.py"
steps = 200
batch_size = 48
batch_sizes = {"sts": 64}
passage_len = 48
n_negatives = 3                    # the paper's 7 cost twice the time of a step here
learning_rate = 1e-3
dims = (64, 128, 256, 512)
