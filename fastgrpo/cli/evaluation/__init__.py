"""The commands that judge: `evaluate`, `reproduce`, `study`, `score`, `check-reward`. Read
`evaluate.py` first.
"""
