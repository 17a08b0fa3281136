"""The ranks of a run: their mesh, the division of work, sharded weights, shared sequences.

Imports core alone. Read `world.py` first. PyTorch's own FSDP2, DeviceMesh, gloo and NCCL.
"""
