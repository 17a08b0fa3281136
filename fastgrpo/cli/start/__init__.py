"""The commands that come before a run: `fastgrpo init`. Read `init.py` first."""
