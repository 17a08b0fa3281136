"""The parts of a run, put together once, and its held-out evaluations. Read `session.py` first."""

from fastgrpo.session.session import Session, TrainingSet, claim, open_session

__all__ = ["Session", "TrainingSet", "claim", "open_session"]
