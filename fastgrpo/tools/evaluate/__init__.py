"""`fastgrpo evaluate`: base against trained on held-out prompts. Read `evaluate.py` first."""
