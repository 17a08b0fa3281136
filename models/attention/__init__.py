"""Attention processors of the families: without masks, and for shared sequences.

Imports parallel and core. Read `joint.py` first.
"""
