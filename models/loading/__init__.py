"""What families are made of: the diffusers layout, weights read into shards, adapters.

Imports core and parallel; knows no family. Read `diffusers_folder.py` first.
"""
