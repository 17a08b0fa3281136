"""`fastgrpo init`: a folder with a recipe and all that goes with it, to begin from; `fastgrpo fetch`:
what a recipe needs from hubs.

Read `init.py` first; `recipe_text.py` edits a recipe and keeps its comments, `my_reward.py` is what
a new folder has as a reward of one's own, and `fetch.py` is the other command.
"""
