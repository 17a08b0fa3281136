"""What several rewards share: options, choice of frames, weight files, thresholds, optical flow.

Imports core and, for rows of prompt files, data. Read `options.py` first.
"""
