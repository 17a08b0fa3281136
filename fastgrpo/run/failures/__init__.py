"""What spoils or ends a run, told in one line: explosions, a lost folder, memory that is full.

Read `alarms.py` first.
"""
