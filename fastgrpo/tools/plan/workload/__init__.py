"""How much there is to do in an iteration, and who waits for whom.

Read `network_calls.py` first.
"""
