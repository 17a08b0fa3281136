"""`fastgrpo score`: what rewards say of clips in files. Read `score.py` first."""
