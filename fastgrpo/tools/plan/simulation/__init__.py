"""One rank with the full-size network on the meta device: what PyTorch itself counts.

Read `rank.py` first.
"""
