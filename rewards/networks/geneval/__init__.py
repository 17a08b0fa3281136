"""GenEval: its rules, its detector with OpenMMLab's or transformers' weights, its colours.

Read `rules.py` first. Imports core, rewards.common and networks.clip.
"""
