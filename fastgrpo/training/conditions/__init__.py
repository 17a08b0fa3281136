"""Prompts to conditions of the network: encoded once, kept in a cache with a fingerprint.

Read `encode.py` first. Imports data, models and run.
"""
