"""Tests of fastgrpo/checkpoint."""
