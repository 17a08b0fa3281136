"""What a run reads: prompts, their files, images and videos; and the tiny world that ships with the
project.

Imports core and algorithm. Read `prompts.py` first.
"""
