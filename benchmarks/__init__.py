"""Measurements: commands that print the figures of the pages in docs/.

Nothing here asserts a wall time. speed: the seconds of an iteration; learning: what training
gains; plan: the planner against counts; rewards: the reward server; gpu: the first quarter of an
hour on a card. They may import anything of fastgrpo, and nothing of fastgrpo imports them.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The repository's root, where launch/ and data/ lie."""
