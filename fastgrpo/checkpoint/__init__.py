"""Checkpoints: written whole or not at all, read by the run that resumes or by tools, and what a run began with.

Imports training and every floor below. Read `checkpoints.py` first, then `resume.py`.
"""
