"""A vision-language model behind an OpenAI-compatible endpoint, asked questions about clips.

Imports core, rewards.common and rewards.serving. Read `asking.py` first.
"""
