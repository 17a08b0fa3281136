"""Tiny random checkpoints of every family in the real folder layout; a file per family with
`write(folder)`.
"""
