"""`fastgrpo reproduce`: every table and figure of the paper as runs, checkpoints and an output.

Read `entries.py` first.
"""
