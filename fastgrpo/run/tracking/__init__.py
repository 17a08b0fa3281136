"""A run's numbers elsewhere than in its metrics.jsonl: wandb, SwanLab, and event files for
TensorBoard.

Each file is one place, and none ends a run; `tracker.py`, one folder up, writes to all.
`service.py` is what wandb and SwanLab have in common.
"""
