"""`fastgrpo evaluate`: base against trained on held-out prompts, by several rewards. Read `evaluate.py` first."""
