"""Tests of models/: every family against diffusers' pipeline."""
