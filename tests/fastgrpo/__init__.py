"""Tests of fastgrpo/, in the same folders."""
