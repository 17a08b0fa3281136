"""Tests of fastgrpo/parallel."""
