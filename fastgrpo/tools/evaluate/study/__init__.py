"""`fastgrpo study`: blind pairs for raters, and what their votes say. Read `build.py` first."""
