"""A run as it goes on: the course of its updates, where it is now, and the page that says so.

Read `server.py` first, which is `fastgrpo watch`.
"""
