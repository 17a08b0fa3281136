"""fastgrpo: reinforcement learning for video and image generators (DanceGRPO, arXiv 2505.07818)."""
