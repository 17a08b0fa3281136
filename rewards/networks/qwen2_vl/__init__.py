"""Qwen2-VL as a judge: its body, patches, chat text and templates, for VideoAlign and HPSv3.

Read `body.py` first. Imports core and rewards.common.
"""
