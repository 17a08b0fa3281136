"""`fastgrpo plan`: memory and seconds of a recipe on so many GPUs, before any is used.

Read `planner.py` first.

Imports no torch, but for `simulation/`: a plan is wanted in a second.
"""
