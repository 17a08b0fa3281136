"""What families are made of: the diffusers layout, weights read into shards, adapters.

Imports core, algorithm and parallel, `policies.py` the registry too; knows no family by name.
Read `policies.py` first.
"""
