"""`fastgrpo export`: a checkpoint as a folder that diffusers loads. Read `export.py` first."""
