"""Measurements: commands that print the numbers of docs/performance.md. Nothing here asserts a wall time."""
