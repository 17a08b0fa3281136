"""The ground floor: errors, settings, files, processes, memory, protocols.

Imports no other package of fastgrpo. Read `config/sections.py` first: the keys of a recipe.
This face imports nothing, so that `fastgrpo --help` starts without torch.
"""
