"""CLIP as a reward: weights of open_clip and transformers, pixels, text.

Read `clip_reward.py` first. Imports core and rewards.common.
"""
