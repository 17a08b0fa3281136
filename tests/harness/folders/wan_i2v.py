"""A tiny random Wan 2.2 TI2V-5B, whose one folder serves text-to-video and image-to-video."""

from tests.harness.folders.wan import write_ti2v as write

__all__ = ["write"]
