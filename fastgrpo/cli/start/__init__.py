"""The commands that come before a run: `fastgrpo init`, `fastgrpo fetch`. Read `init.py` first."""
