"""Checkpoints, written whole or not at all, their readers, and the record of a run's beginning.

Imports training and every floor below. Read `checkpoints.py` first, then `resume.py`.
"""
