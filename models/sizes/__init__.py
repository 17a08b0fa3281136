"""What a plan wants to know of a family: a network's matrices, and the bytes that its blocks keep.

Imports nothing of fastgrpo, and no torch: a plan is wanted in a second. Knows no family by name.
Read `family_plan.py` first.
"""
