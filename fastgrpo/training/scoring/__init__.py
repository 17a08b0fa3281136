"""Scores of an iteration's clips: from this process or from servers, while the next clips are drawn.

Imports rewards and every floor below. Read `scorer.py` first, then `sources.py`.
"""
