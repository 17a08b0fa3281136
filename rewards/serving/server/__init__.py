"""The reward server: admission, batching, metrics, logs, and the child process of a trainer.

Read `app.py` first. Imports rewards.serving.
"""
