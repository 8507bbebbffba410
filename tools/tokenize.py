"""Write the token shards of stage 1 before it starts, on any number of processes.

    torchrun --nproc_per_node=32 -m tools.tokenize config/full/pretrain.py --data=FOLDER
    torchrun --nproc_per_node=8 --nnodes=8 train.py config/full/pretrain.py --data=FOLDER

The settings are those of the run, and so are the files: OUT/tokenizer-*.tiktoken and
OUT/tokens-HASH/. All processes must see OUT. A run that broke off continues with the next shard.
"""
import sys

import data
import train
from configurator import run_command
from engine import distributed, run


def main(argv=None):
    """Index the text, train the tokenizer if it is missing, and write the shards."""
    cfg = run.chain(train.TrainConfig, sys.argv[1:] if argv is None else list(argv))[-1]
    if cfg.stage != "pretrain":
        raise ValueError(f"stage {cfg.stage} reads no tokens; give the config of stage 1")
    world = distributed.start("cpu")
    try:
        world.on_main(lambda: train.prepare_data([cfg]))
        (kind, files), = data.task_files(cfg)
        rows = data.open_rows(files, kind, skip_bad=cfg.skip_bad_lines, world=world)
        tokenizer = world.on_main(lambda: train.train_tokenizer(cfg))
        stream = data.token_stream(rows, tokenizer, cfg, world)
        if world.is_main:
            print(f"{stream.folder}: {len(rows):,} documents, {len(stream):,} tokens in "
                  f"{len(stream.starts) - 1:,} shards")
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_command(main)
