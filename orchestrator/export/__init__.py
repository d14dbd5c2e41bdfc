"""Cells as checkpoints that other programs load."""
