"""Tiny weights of rewards in the published layouts."""
