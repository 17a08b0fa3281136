"""The reward server under load, and scoring that hides behind the rollout.

Read first: server.py, which starts itself as the server and sends it clips from many clients;
overlap.py pretends a rollout and a reward, both asleep.
"""
