"""Tests of fastgrpo/core."""
