"""`fastgrpo check`: every mistake of a recipe that shows without loading a model.

Read `check.py` first; `without_effect.py` has the keys that others leave without effect.
"""
