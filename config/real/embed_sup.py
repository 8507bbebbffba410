"""Stage 4 on public sets: retrieval, CLR, classes and STS; DHNM and MRL (PAPER Sec. 3.1 to 3.4).

    torchrun train.py config/real/embed_sup.py     # all four stages

DEVIATES from App. A and Table 11: fewer rows of classes and STS, one batch size for all tasks, and
fewer hard negatives. config/full has the paper's values.
"""
stage = "embed_sup"
previous = "config/real/embed_weak.py"
steps = 250
batch_size = 64
task_weights = {"retrieval": 2, "clr": 3, "classification": 0.5, "sts": 0.3}
passage_len = 128
n_negatives = 3                    # the paper's 7 cost twice the time of a step here
learning_rate = 1.5e-4
dims = (32, 64, 128, 256)
