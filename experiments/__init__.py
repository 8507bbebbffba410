"""Measurements: the paper's claims at the scale at hand, speed and memory."""
