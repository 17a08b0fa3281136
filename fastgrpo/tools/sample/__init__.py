"""`fastgrpo sample`: clips of a base model, a checkpoint or an export. Read `sample.py` first."""
