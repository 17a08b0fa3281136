"""Tests, in the same folders as the code; harness/ has what they share, system/ the whole runs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).parent / "goldens"
