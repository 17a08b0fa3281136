"""`fastgrpo preflight`: is a recipe correct on this machine. Read `checks.py` first."""
