"""Stage 2 at full size: supervised fine-tuning on query-positive pairs (PAPER Sec. 3.1.1, App. A).

    torchrun --nproc_per_node=8 --nnodes=2 train.py config/full/sft.py --data=FOLDER

The paper: ~600M pairs as instruction, input, output; 16 x Ascend 910B, 38 hours.
"""
stage = "sft"
previous = "config/full/pretrain.py"
passage_len = 32_768
query_len = 32_768
batch_size = 64
steps = 600_000_000 // 64
learning_rate = 2e-5
warmup = 0.02
weight_decay = 0.001
beta2 = 0.999
save_every = 2_000                 # a step is short, and a save writes 18 GB
