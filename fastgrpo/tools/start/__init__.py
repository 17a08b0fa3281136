"""`fastgrpo init`: a folder with a recipe and all that goes with it, to begin from.

Read `init.py` first; `recipe_text.py` edits a recipe and keeps its comments, and `my_reward.py` is
what a new folder has as a reward of one's own.
"""
