"""Whole runs: every launch file, meshes, resuming, kills, slurm.

`make test-fast` leaves this folder out.
"""
