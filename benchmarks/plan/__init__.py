"""The planner against what can be counted without a GPU: memory, FLOPs and bytes.

Read first: check.py, the command. blocks.py and decoders.py measure, on tensors without contents,
the constants that fastgrpo/tools/plan holds.
"""
