"""What a run needs before it is started: parameters, memory by part, tokens and FLOPs a step.

    python train.py config/full/embed_weak.py --dry_run

Arithmetic over the shape alone; the model is built on the meta device, where a tensor has a shape
and no memory. PAPER Sec. 4.2: 8 layers, 3584 wide, make 1,499.2M parameters here (paper: 1503M).
Weights, gradients and the two moments of AdamW are float32, 16 bytes a parameter, and exact.
Activations and buffers are estimates for bfloat16 autocast, kernels that never hold a (T, T)
tensor, and texts as long as the configuration allows: an upper bound, as real texts are shorter.

B texts, T tokens of a text, S = B * T, D width, E head dim, K key/value heads, H heads, F ffn dim,
V vocabulary, N parameters, W ranks.

What comes before the first step follows the law in results/rehearsal.json, which
experiments/rehearsal.py has measured: seconds of a rank for a unit of data, divided by the ranks.
"""
from collections import Counter
from pathlib import Path

from engine.jsonl import read_object
from engine.kernels import logits_chunk

LAW = Path(__file__).resolve().parent.parent / "results" / "rehearsal.json"
CARD = 300e12                      # FLOP/s of a card's matmuls, for what runs on cards
TEXT = 256                         # tokens of a text that is embedded for mining

WORLDS = (1, 8, 16, 64)
MODES = ("ddp", "zero1", "fsdp")
GB = 1e9


def parameters(config):
    """Return {part: number of parameters} of a `ConanConfig`; the tied output counts once."""
    c, kv, inside = config, config.n_kv_head * config.head_dim, config.n_head * config.head_dim
    return {"embedding": c.vocab_size * c.n_embd,
            "attention": c.n_layer * 2 * c.n_embd * (inside + kv),
            "ffn": c.n_layer * 3 * c.n_embd * c.ffn_dim,
            "norms": (2 * c.n_layer + 1) * c.n_embd}


def flops(config, texts, lm=False):
    """Return the FLOPs of one step, forward and backward; `texts` maps tokens T to a number of B.

    A matrix of n parameters costs 6 n a token (2 forward, 4 backward), attention 12 T D a token and
    layer. `lm`: attention is causal, half of that, and the next-token logits take 6 V D a token.
    Nothing that is computed twice is counted twice: the numerator of the model FLOPs utilisation.
    """
    part = parameters(config)
    dense = part["attention"] + part["ffn"] + (part["embedding"] if lm else 0)
    attention = 12 * config.n_layer * config.n_head * config.head_dim * (0.5 if lm else 1)
    return sum(b * t * (6 * dense + attention * t) for t, b in texts.items())


def memory(config, mode="ddp", world=1, adapters=0):
    """Return {part: bytes on one rank} that a rank holds all the time: 16 N in all on one rank.

    ddp keeps everything on every rank, zero1 slices the optimizer's state (PAPER App. A), fsdp
    slices all three. On one rank every mode is the same. adapters: their number of parameters
    (lora.py); they alone then have gradients and optimizer state.
    """
    n = sum(parameters(config).values()) + adapters
    trained = adapters or n
    share = {"ddp": (1, 1, 1), "zero1": (1, 1, world), "fsdp": (world, world, world)}[mode]
    return {"weights": 4 * n / share[0], "gradients": 4 * trained / share[1],
            "optimizer": 8 * trained / share[2]}


def activations(config, tokens, recompute=False, head=False, copies=True):
    """Estimate the bytes that one pass over `tokens` tokens keeps for backward, and its buffers.

    A block keeps for each token: its float32 input and the sum in its middle (8 D), the norms'
    outputs (4 D), q, k, v (2 D + 4 K E), attention's output twice (4 D) and row sums (4 H), gate,
    up and product (6 F); with `recompute` only the input, and of one block at a time the rest.
    `copies`: autocast keeps bfloat16 ones of the weights to the end of the step. `head`: the
    float32 gradient of the output embedding, a bfloat16 copy of that embedding and a chunk's part
    of the gradient, and the logits of a chunk, in float32 and in bfloat16. Only the gradient is
    still there when a block is computed again.
    """
    c, part = config, parameters(config)
    block = 12 * c.n_embd + (6 * c.n_head + 4 * c.n_kv_head) * c.head_dim + 4 * c.n_head \
        + 6 * c.ffn_dim
    total = c.n_layer * tokens * (4 * c.n_embd if recompute else block)
    total += 8 * c.n_embd * tokens                 # the last norm: input and output
    total += 2 * (part["attention"] + part["ffn"]) if copies else 0
    chunk = min(logits_chunk(c.vocab_size, "cuda"), tokens)
    gradient = 4 * part["embedding"] if head else 0
    logits = 2 * gradient + 6 * chunk * c.vocab_size if head else 0
    return total + max(logits, gradient + tokens * block if recompute else 0)


def largest_pass(cfg, config, tokens, head, copies):
    """Return `activations` of a pass of so many tokens, or of one just too short to recompute."""
    recompute = 0 < cfg.checkpointing <= tokens
    need = activations(config, tokens, recompute, head, copies)
    if recompute and cfg.stage != "pretrain":              # whose passes are all of one size
        need = max(need, activations(config, cfg.checkpointing - 1, False, head, copies))
    return need


def unsharded(config):
    """Return the bytes that a rank of fsdp gathers for the time it needs them.

    The root (embedding and last norm) in float32 with its gradient; of the blocks, in bfloat16, the
    one at work with its gradient and the next one.
    """
    part = parameters(config)
    return 8 * part["embedding"] + 6 * (part["attention"] + part["ffn"]) / config.n_layer


def step_texts(cfg):
    """Return {T: number of texts} of a step of a stage, all ranks together, each at its limit.

    Of stage 4 it is the task with the most tokens: STS has a batch of its own, and two sentences.
    """
    if cfg.stage in ("pretrain", "sft"):
        return {cfg.passage_len: cfg.batch_size}
    passages = 1 + (cfg.n_negatives if cfg.stage == "embed_sup" else 0)
    tasks = [{cfg.query_len: 2 * n} if kind == "sts" else
             Counter({cfg.query_len: n}) + Counter({cfg.passage_len: n * passages})
             for kind, n in batches_of(cfg).items()]
    return max(tasks, key=lambda texts: sum(t * b for t, b in texts.items()))


def batches_of(cfg):
    """Return {kind: rows of a batch}; stage 4 has several kinds, its tasks."""
    if cfg.stage != "embed_sup":
        return {"text" if cfg.stage == "pretrain" else "pairs": cfg.batch_size}
    return {kind: cfg.batch_sizes.get(kind, cfg.batch_size)
            for kind, weight in cfg.task_weights.items() if weight > 0}


def visits(cfg):
    """Return {kind: what the steps of a stage visit}: tokens of "text", rows of all others."""
    sizes = batches_of(cfg)
    if cfg.stage != "embed_sup":
        return {kind: cfg.steps * n * (cfg.passage_len if kind == "text" else 1)
                for kind, n in sizes.items()}
    steps = cfg.steps / sum(cfg.task_weights[kind] / n for kind, n in sizes.items())
    return {kind: steps * cfg.task_weights[kind] for kind in sizes}


def mined(amount):
    """Return the rows of each task that has hard negatives."""
    return [n for kind, n in amount.items() if kind not in ("text", "pairs", "sts")]


def start_minutes(law, stage, amount, world, shape=None):
    """Return {part: minutes on one rank} of a stage's start; amount: {kind: tokens or rows}.

    Mined tasks have twice as many passages as rows, and each is searched by itself; they need
    `shape`. Embedding and search run on cards, at the share of a matmul's rate that exact search
    reached in the rehearsal.
    """
    total, million, size = sum(amount.values()), sum(mined(amount)) / 1e6, law["bytes"]
    parts = {"pretrain": {"index": ("index of text", total * size["a token of text"] / 1e9),
                          "tokens": ("token shards", total / 1e6)},
             "embed_sup": {"index": ("index of stage 4", total / 1e6),
                           "tables": ("passage tables", million),
                           "pools": ("pools of mined rows", million)}}.get(
        stage, {"index": ("index of pairs", total * size["a pair"] / 1e9)})
    minutes = {name: law[part]["seconds"] * units / world / 60
               for name, (part, units) in parts.items()}
    if million:
        rate = CARD * law["exact search"]["share"] * world * 60
        weights = sum(parameters(shape).values()) - parameters(shape)["embedding"]
        minutes["embedding"] = 3e6 * million * TEXT * 2 * weights / rate
        minutes["search"] = sum(2 * n * 2 * n for n in mined(amount)) * shape.n_embd / rate
    return minutes


def start_bytes(law, stage, amount, cfg):
    """Return {what: bytes}: files on disk, and DHNM's pools in the memory of all ranks together."""
    disk = law["disk"]
    if stage == "pretrain":
        return {"disk": sum(amount.values()) * disk["a token"]}
    if stage != "embed_sup":
        return {"disk": sum(amount.values()) * 8}
    pool = 8 * cfg.pool_size + 12 * cfg.n_negatives + 9       # dhnm.py's tensors, a row
    return {"disk": sum(amount.values()) * disk["a row of stage 4"],
            "pools": sum(mined(amount)) * pool}


def start_report(cfg, shape):
    """Return the lines of `--dry_run` about what comes before the first step."""
    if not LAW.is_file():
        return ["", "the start: run `python -m experiments.rehearsal`, which measures its law"]
    law = read_object(LAW)["law"]
    amount = visits(cfg)
    minutes = {w: start_minutes(law, cfg.stage, amount, w, shape) for w in WORLDS}
    lines = ["", f"the start, minutes on each rank: at most {sum(amount.values()):.3g} "
             f"{'tokens' if cfg.stage == 'pretrain' else 'rows'} (each visit counts), by the law "
             "of results/rehearsal.json",
             *(f"    {part:<12}" + "".join(f"{minutes[w][part]:>12,.1f}" for w in WORLDS)
               for part in minutes[1]),
             f"    {'ranks':<12}" + "".join(f"{world:>12}" for world in WORLDS)]
    sizes = start_bytes(law, cfg.stage, amount, cfg)
    lines.append(f"    on disk {sizes['disk'] / GB:,.1f} GB")
    if "pools" in sizes:
        lines += [f"    DHNM's pools {sizes['pools'] / GB:,.1f} GB, shared out among the ranks",
                  f"    embedding ({TEXT} tokens a text) and search fall away where rows bring "
                  "cosines (tools/mine.py); both at 300 TFLOP/s a card"]
    return lines


def report(cfg, model):
    """Return the text of `--dry_run`: `cfg` a `TrainConfig`, `model` its model, on "meta" say."""
    shape, texts, lm = model.config, step_texts(cfg), cfg.stage in ("pretrain", "sft")
    parts, tokens = parameters(shape), sum(t * b for t, b in texts.items())
    total = sum(parts.values())
    adapters = model.count_params() - total
    per_step = flops(shape, texts, lm)
    lines = [f"{cfg.stage}: {total:,} parameters ({total / 1e6:,.1f}M)",
             *(f"    {name:<12}{n:>15,}" for name, n in parts.items()),
             *([f"    {'adapters':<12}{adapters:>15,}  rank {cfg.lora_rank}; they alone train"]
               if adapters else []),
             f"a step: {sum(texts.values()):,} texts, at most {tokens:,} tokens, "
             f"{per_step:.3g} FLOPs (nothing counted twice)",
             f"the stage: {cfg.steps:,} steps, at most {cfg.steps * tokens:.3g} tokens, "
             f"{cfg.steps * per_step:.3g} FLOPs", "",
             f"GB on each rank: checkpointing {cfg.checkpointing or 'never'}, "
             f"micro_batch_size {cfg.micro_batch_size or 'all'}, activations estimated",
             f"{'mode':<7}{'ranks':>6}{'weights':>10}{'gradients':>11}{'optimizer':>11}"
             f"{'gathered':>10}{'activations':>13}{'sum':>9}"]
    for mode in [m for m in MODES if m != "fsdp" or not adapters]:         # see TrainConfig
        for world in WORLDS:
            always = memory(shape, mode, world, adapters)
            sharded = mode == "fsdp" and world > 1         # blocks come in bfloat16
            gathered = unsharded(shape) if sharded else 0
            act = largest_pass(cfg, shape, pass_tokens(cfg, texts, world), lm, not sharded)
            numbers = [*always.values(), gathered, act]
            cells = "".join(f"{x / GB:>{w}.1f}" for x, w in zip(
                [*numbers, sum(numbers)], (10, 11, 11, 10, 13, 9)))
            lines.append(f"{mode:<7}{world:>6}{cells}")
    return "\n".join(lines + start_report(cfg, shape))


def pass_tokens(cfg, texts, world):
    """Return the tokens of one rank's largest pass: its share, or a micro batch of long texts."""
    here = {t: -(-b // world) for t, b in texts.items()}
    left, tokens = cfg.micro_batch_size or sum(here.values()), 0
    for t in sorted(here, reverse=True):
        tokens, left = tokens + t * min(left, here[t]), left - min(left, here[t])
    return tokens
