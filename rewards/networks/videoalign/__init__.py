"""VideoAlign (VideoReward): a Qwen2-VL with adapters and a head, its frames, prompt and folder.

Read `network.py` first. Imports core and rewards.common.
"""
