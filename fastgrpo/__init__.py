"""fastgrpo: reinforcement learning for video and image generators (DanceGRPO, arXiv 2505.07818).

`train.py` is the first file to open: Algorithm 1, read top to bottom. docs/architecture.md has the
rooms and floors.
"""

__version__ = "0.1.0"
