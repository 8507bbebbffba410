"""Stage 2 at full size: supervised fine-tuning on query-positive pairs (PAPER Sec. 3.1.1, App. A).

    torchrun --nproc_per_node=8 --nnodes=2 train.py config/full/sft.py --pairs=pairs.jsonl

The paper: ~600M pairs as instruction, input, output; 16 x Ascend 910B, 38 hours.
"""
stage = "sft"
previous = "config/full/pretrain.py"
out = "out/full"
passage_len = 32_768
query_len = 512
batch_size = 64
steps = 600_000_000 // 64
learning_rate = 2e-5
warmup = 0.02
weight_decay = 0.001
beta2 = 0.999
save_every = 1000

vocab_size = 150_000               # Sec. 3.1.1, 4.2
n_layer = 8
n_head = 32
n_kv_head = 8
n_embd = 3584
ffn_dim = 8192
attention_dim = 3584
block_size = 32_768
norm_eps = 1e-5                    # UNSPECIFIED, as are the next two: the customary start
embed_std = 0.02
embed_rank_power = 0.0
train_missing = False              # at this size a missing stage is an error, not a week of work
checkpointing = True
