"""Stage 1 at full size: LLM pretraining (PAPER Sec. 3.1.1, App. A).

    torchrun --nproc_per_node=8 --nnodes=8 train.py config/full/pretrain.py --data=FOLDER

The paper: ~3T tokens, 64 x Ascend 910B, 219 hours (more than those chips can do: docs/paper.md).
The shape of the model is written here; the later stages take it over.
"""
stage = "pretrain"
out = "out/full"
passage_len = 32_768               # tokens of a window
query_len = 32_768
batch_size = 256
micro_batch_size = 1               # a window fills a card; the result is the same
steps = 3_000_000_000_000 // (256 * 32_768)
learning_rate = 1e-4
warmup = 0.05
weight_decay = 0.001
beta2 = 0.999                      # UNSPECIFIED: AdamW's own default
save_every = 1000

vocab_size = 150_000               # Sec. 3.1.1, 4.2
n_layer = 8
n_head = 32
n_kv_head = 8
n_embd = 3584
ffn_dim = 8192
block_size = 32_768
parallel = "zero1"                 # App. A
checkpointing = 16_384             # shorter passes keep their activations, 15 GB at most
