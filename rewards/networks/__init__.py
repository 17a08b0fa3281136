"""The networks that rewards look with: CLIP, and VideoAlign's Qwen2-VL.

Imports core and rewards.common. Read `clip/clip_reward.py` first.
"""
