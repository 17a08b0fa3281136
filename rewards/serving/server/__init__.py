"""The reward server: admission, batching, metrics, logs, and the process that runs beside a trainer.

Read `app.py` first. Imports rewards.serving.
"""
