"""Machinery that a reader of the method can skip: devices and ranks, checkpoints."""
