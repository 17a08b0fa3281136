"""`fastgrpo report`: a run as one HTML page. Read `report.py` first."""
