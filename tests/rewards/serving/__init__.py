"""Tests of rewards/serving: real HTTP servers."""
