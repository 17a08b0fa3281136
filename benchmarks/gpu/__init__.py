"""The first quarter of an hour on a real card: one command, its most telling measurements first.

Read first: __main__.py, the command; docs/guides/gpu/first_gpu.md says how to read what it prints.
Stages are files of their own, run as child processes. What they need is imported inside, so that
whatever is missing costs one line; stages `machine` and `blocks` import nothing of fastgrpo.
"""
