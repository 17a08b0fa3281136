"""The trainer's side of the reward server: retries, deadlines, replicas.

Read `client.py` first. Imports rewards.serving.
"""
