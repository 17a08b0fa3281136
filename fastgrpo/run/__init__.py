"""A run as people see it while it goes on: numbers, terminal, heartbeats, seconds of each rank, stopping in good order.

Imports core and parallel. Read `tracker.py` first, or `stopping.py` for how a run ends.
"""
