"""The commands that judge: `evaluate`, `reproduce`, `score`, `check-reward`. Read `evaluate.py` first."""
