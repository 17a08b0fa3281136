"""Where the seconds of an iteration go, and what each way of working costs.

Read first: iteration.py, the comparison; ways.py has its contestants and public_way.py the plain
one of them. breakdown.py divides one iteration by part; meters.py counts bytes and forwards; the
others stand alone.
"""
