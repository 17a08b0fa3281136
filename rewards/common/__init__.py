"""What several rewards share: options, choice of frames, weight files, thresholds, optical flow.

Imports core alone. Read `options.py` first.
"""
