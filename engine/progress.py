"""What a run shows and hears: the progress bar, the log file, and the signals that stop it."""
import json
import signal
import time
from collections import Counter

from tqdm import tqdm

from engine import budget, distributed


class StopSignal:
    """Remember that SIGTERM or SIGINT came; the loop looks at it between two steps."""

    def __init__(self):
        self.raised, self.number = False, 0
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        if number == self.number == signal.SIGINT:     # a second Ctrl-C does not wait; SIGTERM may
            raise KeyboardInterrupt                    # come twice, from torchrun and from outside
        self.raised, self.number = True, number

    def restore(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_log(path, step):
    """Open a log to append to it, without what a killed run wrote after its last checkpoint.

    Lines of steps after `step`, and a half line at the end, are cut off: each step stands there
    once.
    """
    kept = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        file.truncate(kept)
    return open(path, "a", encoding="utf-8")


def open_board(folder, step):
    """Return a tensorboard writer; what a killed run wrote after `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package: `pip install tensorboard`") from None
    return SummaryWriter(str(folder), purge_step=step + 1)


class Log:
    """The progress bar, and OUT/STAGE/log.jsonl with the same keys (README: glossary).

    With `cfg.tensorboard` the numbers go to OUT/STAGE/tensorboard as well.
    """

    def __init__(self, cfg, world, step):
        self.cfg, self.world = cfg, world
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        self.file = open_log(cfg.run_dir / "log.jsonl", step) if world.is_main else None
        wanted = world.is_main and getattr(cfg, "tensorboard", False)
        self.board = open_board(cfg.run_dir / "tensorboard", step) if wanted else None
        self.bar = tqdm(total=cfg.steps, initial=step, desc=cfg.stage, unit="step",
                        disable=not world.is_main, mininterval=1.0)
        self.peak = distributed.peak_flops(world.device)
        self._restart()

    def _restart(self):
        self.since, self.tokens, self.data, self.flops = time.perf_counter(), 0, 0.0, 0

    def candidates(self, tasks):
        """Say once how many candidates each query sees: accumulation would not add any."""
        if self.world.is_main and self.cfg.stage.startswith("embed"):
            rows = Counter()
            for task, _ in tasks:
                rows[task.kind] += len(task.rows)
            for task in {task.kind: task for task, _ in tasks if task.kind != "sts"}.values():
                each = 1 + (self.cfg.n_negatives if task.pool else 0)
                tqdm.write(f"{task.kind}: {rows[task.kind]:,} rows, {task.size * each} candidates "
                           f"a query, {self.cfg.steps} steps of {task.size}")

    def step(self, step, batch, measured, data_seconds, known):
        """Take one step's numbers; every `log_every` steps write them.

        measured: this rank's, to be averaged over ranks; known: the same on all ranks. `mfu`, the
        share of the chip's nominal FLOP/s that the model's own FLOPs make, is there on chips whose
        figure is known.
        """
        lm = batch.targets is not None
        if self.peak:
            self.flops += budget.flops(self.cfg.model_config(), Counter(batch.lengths), lm, lm)
        self.tokens += len(batch.ids) * self.world.size
        self.data += data_seconds
        self.bar.update()
        if (step + 1) % self.cfg.log_every and step + 1 < self.cfg.steps:
            return
        seconds = time.perf_counter() - self.since
        row = {"step": step + 1, "task": batch.task, **self.world.mean(measured), **known,
               "tokens_per_second": self.tokens / seconds, "data_share": self.data / seconds}
        if self.peak:
            row["mfu"] = self.flops / seconds / self.peak
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} "
                                     "tokens/s")
        for key, value in row.items() if self.board else ():
            if isinstance(value, (int, float)) and key != "step":
                self.board.add_scalar(key, value, row["step"])
        self._restart()

    def close(self):
        """Finish the bar and the files."""
        self.bar.close()
        if self.board:
            self.board.close()
        if self.file:
            self.file.close()
