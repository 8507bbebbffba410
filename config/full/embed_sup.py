"""Stage 4 at full size: retrieval, CLR, classes, STS; DHNM and MRL (PAPER Sec. 3.1.2 to 3.4).

    torchrun --nproc_per_node=8 --nnodes=2 train.py config/full/embed_sup.py --data=FOLDER

The paper: 16 x Ascend 910B, 13 hours. UNSPECIFIED: App. A's batches of 4 and 32 are read as each
rank's: with 16 ranks 64 and 512 in all. CLR and classes have retrieval's. UNSPECIFIED: the number
of epochs; with a single one no query comes twice, and DHNM could never act.
"""
stage = "embed_sup"
previous = "config/full/embed_weak.py"
passage_len = 32_768
query_len = 32_768
batch_size = 64
batch_sizes = {"sts": 512}
task_weights = {"retrieval": 3.0, "clr": 3.0, "classification": 2.8, "sts": 1.8}  # Table 11
_epochs = 3
steps = _epochs * (8_800_000 // 64 + 1_800_000 // 512)
n_negatives = 7
learning_rate = 1e-4
warmup = 0.05
weight_decay = 0.001
beta2 = 0.999
temperature = 0.05                 # UNSPECIFIED
dims = (256, 512, 1024, 1536, 2048, 3072, 3584)
save_every = 2_000                 # a step is short, and a save writes 18 GB
