"""Scores on their way: a loaded reward in this process, or behind the HTTP server.

Imports core, data and the registry of rewards. Read `loaded_reward.py` first, then `wire.py`.
"""
