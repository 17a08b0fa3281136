"""Tests of fastgrpo/run."""
