"""Prompts to what the network is conditioned on: encoded once, kept in a cache, known by what they are made of.

Read `encode.py` first. Imports data, models and run.
"""
