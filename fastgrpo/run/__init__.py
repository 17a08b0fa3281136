"""A run as people see it: numbers, terminal, heartbeats, seconds of each rank, and its end.

Imports core and parallel. Read `tracker.py` first, or `stopping.py` for how a run ends.
"""
