"""Stage 3 on a folder of public sets: titles, questions and bitext under the soft mask.

    python train.py config/real/embed_sup.py --root=FOLDER      # runs this stage, too

A batch is taken from one set and one passage language, so that its negatives are alike.
"""
stage = "embed_weak"
previous = "config/real/sft.py"
out = "out/real"
steps = 500
batch_size = 256
passage_len = 96
learning_rate = 1.5e-4
save_every = 100
file_weights = {                   # the languages of the questions to be asked, and sets like them
    "tldr*": 0.15, "csl*": 0.15, "medquad*": 0.4, "jaquad*": 0.5, "en_text*": 0.4, "others": 0.3,
    "stsb*": 1.5, "mlqa_train*": 2, "*-en-de": 3, "*-en-es": 3, "*-en-ar": 5, "*-en-hi": 5,
    "*-en-vi": 5, "*-en-zh": 5}

vocab_size = 64_000
n_embd = 4096
attention_dim = 128
ffn_dim = 32
embed_rank_power = 2.0
