"""Stage 3 at full size: weakly supervised contrastive training, soft mask (PAPER Sec. 3.2).

    torchrun --nproc_per_node=8 --nnodes=2 train.py config/full/embed_weak.py --data=FOLDER

The paper: the pairs of stage 2 without those scored below 0.4; 16 x Ascend 910B, 97 hours.
DEVIATES: stage 2 reads the same files, so those are dropped before it (Sec. 3.1.2):
python -m tools.filters --min_score=0.4 --scorer=MODEL
"""
stage = "embed_weak"
previous = "config/full/sft.py"
passage_len = 32_768
query_len = 32_768
batch_size = 64
steps = 600_000_000 // 64
learning_rate = 1e-4
warmup = 0.05
weight_decay = 0.001
beta2 = 0.999
temperature = 0.05                 # UNSPECIFIED
schedule = "linear"                # Eq. 3; App. C has two more
save_every = 2_000                 # a step is short, and a save writes 18 GB
