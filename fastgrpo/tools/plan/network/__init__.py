"""The matrices of a network, from its config alone. Read `units.py` first."""
