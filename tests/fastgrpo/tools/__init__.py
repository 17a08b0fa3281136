"""Tests of fastgrpo/tools."""
