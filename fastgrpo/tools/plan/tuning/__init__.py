"""`fastgrpo plan --tune`: the quickest recipe with the same results, and what to give up where none
fits.

Read `search.py` first. Imports no torch, as the planner.
"""
