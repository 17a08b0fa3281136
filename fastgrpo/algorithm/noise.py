"""Keyed randomness: every random tensor is a function of its key, never of what was drawn before or of the rank.

So a run resumes exactly without saving any generator's state, trajectories do not depend on how work is divided over
ranks, and ranks that must agree do so by construction.
"""

import hashlib

import torch
from torch import Tensor

Key = tuple[int | str, ...]  # a purpose, then seed, iteration, prompt, sample, step: what identifies the draw


def generator(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is determined by the key alone; on a GPU also by its model, as torch's kernels are."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(keys: list[Key], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one row per key.  returns float32 [len(keys), *shape]"""
    return torch.stack([torch.randn(shape, generator=generator(key, device), device=device) for key in keys])


def permutation(n: int, key: Key) -> list[int]:
    """A random order of range(n)."""
    order: list[int] = torch.randperm(n, generator=generator(key)).tolist()
    return order
