"""Stage 4 at full size: retrieval, CLR, classification, STS; DHNM and MRL (Sec. 3.1.2, 3.3, 3.4).

    torchrun --nproc_per_node=8 --nnodes=2 train.py config/full/embed_sup.py \\
        --retrieval=r.jsonl --clr=clr.jsonl --classification=c.jsonl --sts=s.jsonl

The paper: 3.0M + 3.0M + 2.8M + 1.8M rows (Table 11); 16 x Ascend 910B, 13 hours. App. A's batch of
4 and 32 is read as each rank's: 16 ranks, so 64 and 512 all together.
"""
stage = "embed_sup"
previous = "config/full/embed_weak.py"
out = "out/full"
passage_len = 32_768
query_len = 512
batch_size = 64
batch_sizes = {"sts": 512}
n_negatives = 7
steps = 10_600_000 // 64
learning_rate = 1e-4
warmup = 0.05
weight_decay = 0.001
beta2 = 0.999
temperature = 0.05                 # UNSPECIFIED
dims = (256, 512, 1024, 1536, 2048, 3072, 3584)
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
