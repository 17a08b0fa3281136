"""Tests of fastgrpo/algorithm."""
