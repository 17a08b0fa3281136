"""Tests of fastgrpo/cli and the launch files."""
