"""Keyed randomness: every random tensor is a function of its key alone.

A tensor depends neither on the tensors drawn before it nor on the rank. A run therefore resumes
exactly without any generator's state, trajectories do not depend on how work is divided over ranks,
and ranks that must agree do so by construction.
"""

import hashlib

import torch
from torch import Tensor

Key = tuple[int | str, ...]
"""What identifies a draw: a purpose, then seed, iteration, prompt, sample, step."""


def generator(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the key alone; on a GPU also on the GPU's model."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(keys: list[Key], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one row per key.  returns float32 [len(keys), *shape]"""
    rows = [torch.randn(shape, generator=generator(key, device), device=device) for key in keys]
    return torch.stack(rows)


def permutation(n: int, key: Key) -> list[int]:
    """A random order of range(n)."""
    order: list[int] = torch.randperm(n, generator=generator(key)).tolist()
    return order
