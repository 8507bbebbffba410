"""What a folder of train.py holds, for the tables and figures: logs, scores, settings, sizes.

    Run("out").scores("embed_sup")["retrieval/installed_docs/test/ndcg@10"]

What is not there raises `Missing`, whose text names the file and the command that makes it.
"""
import json
from pathlib import Path

import torch

from engine import checkpoint
from model import Conan, ConanConfig
from train import TrainConfig


class Missing(ValueError):
    """Data that a table or figure needs is not there; the text names it and what makes it."""


class Run:
    """Read a folder of train.py: the log, the scores, the settings and the size of its stages."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def need(self, stage, file):
        """Return the path of a file of a stage; raise Missing with the command that writes it."""
        path = self.folder / stage / file
        if not path.is_file():
            raise Missing(f"{path} is missing; make it by: {self.command(stage)}")
        return path

    def command(self, stage):
        """Return the command that trains a stage, and what it needs, into this folder."""
        flag = "" if self.folder == Path("out") else f" --out={self.folder}"
        return f"python train.py config/{stage}.py{flag}"

    def log(self, stage):
        """Return the rows of a stage's log; a last line that was cut off is left out."""
        lines = self.need(stage, "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        if not rows:
            raise Missing(f"{self.folder / stage / 'log.jsonl'} is empty; go on with: "
                          f"{self.command(stage)}")
        return rows

    def scores(self, stage):
        """Return the scores that a stage was given at its end, flat."""
        return json.loads(self.need(stage, "eval.json").read_text(encoding="utf-8"))

    def config(self, stage):
        """Return the config.json of a stage's newest checkpoint: "train", "model" and more."""
        where = checkpoint.latest(self.folder / stage) if (self.folder / stage).is_dir() else None
        if where is None:
            raise Missing(f"{self.folder / stage} has no checkpoint; make it by: "
                          f"{self.command(stage)}")
        return json.loads(checkpoint.load(where, "config.json"))

    def settings(self, stage):
        """Return the `TrainConfig` that a stage was trained with, its folder as it is named now."""
        train = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in self.config(stage)["train"].items()}
        return TrainConfig(**{**train, "out": str(self.folder)})

    def parameters(self, stage):
        """Return the number of weights of a stage's model."""
        with torch.device("meta"):                 # shapes without memory
            return Conan(ConanConfig(**self.config(stage)["model"])).count_params()

    def baseline(self):
        """Return BM25's scores, by the run's own summary; {} if there are none."""
        path = self.folder / "summary.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        return json.loads(text).get("BM25", {})
