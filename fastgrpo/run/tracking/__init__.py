"""A run's numbers elsewhere than in its metrics.jsonl: wandb, and event files for TensorBoard.

Each file is one place, and neither ends a run; `tracker.py`, one folder up, writes to both.
"""
