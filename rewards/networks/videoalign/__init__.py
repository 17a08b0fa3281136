"""VideoAlign (VideoReward): its Qwen2-VL with adapters and heads, its frames, its prompt, its published folder.

Read `network.py` first. Imports core and rewards.common.
"""
