"""Scores of an iteration's clips, from this process or from servers, behind the rollout.

Imports rewards and every floor below. Read `scorer.py` first, then `sources.py`.
"""
