"""Tests of fastgrpo/tools/plan."""
