"""Text encoders of the families: prompts to conditions.

Imports core and models.loading. Read `t5_and_clip.py` first.
"""
