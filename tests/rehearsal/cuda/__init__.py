"""The rehearsed device: a CUDA of host memory, and NCCL's rules.

Nothing is imported here: `core` must be loaded before torch. Read first: device.py.
"""
