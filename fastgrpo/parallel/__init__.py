"""The ranks of a run: the mesh, who works on what, sharded weights, shared sequences.

Imports core alone. Read `world.py` first. PyTorch's own engine throughout: FSDP2, DeviceMesh, gloo and NCCL.
"""
