"""Tests of fastgrpo/training."""
