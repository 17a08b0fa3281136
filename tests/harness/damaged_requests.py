"""Requests to a reward server with something done to them, and the status that each must get."""

import json
import random
import struct
from collections.abc import Sequence

import torch

from fastgrpo.rewards.serving import wire


def damaged(rng: random.Random, names: Sequence[str]) -> bytes:
    """A good small body with something done to it.  names: of rewards, one of which is asked for"""
    frames, size = rng.choice(((3, 8), (1, 2), (4, 4)))
    pixels = [
        torch.full((frames, size, size, 3), rng.randrange(256), dtype=torch.uint8)
        for _ in range(rng.randint(1, 3))
    ]
    name = rng.choice(names)
    good = wire.encode_request(pixels, ["a red circle"] * len(pixels), 8.0, [name])
    (length,) = struct.unpack("<Q", good[:8])
    text, data = good[8 : 8 + length], good[8 + length :]
    match rng.randrange(8):
        case 0:  # truncated
            return good[: rng.randrange(len(good))]
        case 1:  # a lying header length
            return (
                struct.pack(
                    "<Q",
                    rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, rng.getrandbits(64))),
                )
                + good[8:]
            )
        case 2:  # bytes flipped in the header
            changed = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(8 + length)] = rng.randrange(256)
            return bytes(changed)
        case 3:  # noise, or another format's magic
            return rng.choice((b"", b"\x80\x04", b"PK\x03\x04", b"\x93NUMPY")) + rng.randbytes(
                rng.randrange(200)
            )
        case 4:  # numbers out of all measure
            number = rng.choice(
                (
                    "1e999",
                    "-1",
                    "9" * rng.choice((18, 19, 400, 5000)),
                    "NaN",
                    "Infinity",
                    "1.5",
                    "true",
                )
            )
            return header_with(
                text, data, rng.choice((b"[0,", b'"shape": [', b": [")), number.encode()
            )
        case 5:  # other types
            dtype = rng.choice(("F32", "I64", "BF16", "u8", "U8 ", "", "BOOL", "F8_E4M3"))
            return framed(text.replace(b'"U8"', json.dumps(dtype).encode(), 1), data)
        case 6:  # metadata full of what JSON has no place for, or very deep
            inside = rng.choice(
                (
                    "NaN",
                    "-Infinity",
                    "[" * 20_000,
                    '{"a":' * 5_000,
                    "1" * 6000,
                    '"\\ud800"',
                    "null",
                    "[[]]",
                )
            )
            fps = rng.choice(("NaN", "0", "8", inside[:50]))
            request = f'{{"prompts": {inside}, "fps": {fps}, "rewards": ["{name}"]}}'
            return framed(json.dumps({"__metadata__": {"request": request}}).encode(), data)
        case _:  # frames that are not there
            at = [rng.randint(-2, 300) for _ in range(rng.randint(0, 5))]
            asked = {
                "prompts": ["p"] * len(pixels),
                "fps": 8.0,
                "rewards": [name],
                "frames": [{"of": rng.choice((0, 3, 10**9, -1)), "at": at}] * rng.randint(0, 3),
            }
            header = json.loads(text) | {"__metadata__": {"request": json.dumps(asked)}}
            return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_with(text: bytes, data: bytes, place: bytes, number: bytes) -> bytes:
    """The header with a number put in at a place."""
    return framed(text.replace(place, place + number + b",", 1), data)


def fitting(body: bytes, names: Sequence[str]) -> int:
    """The status it must get; damage may do no harm, as another letter in a prompt: our reader is
    the oracle.

    names: of the server's rewards
    """
    try:
        asked = wire.decode_request(bytearray(body)).rewards
        return 200 if set(asked) <= set(names) else 422
    except wire.WireError:
        return 400
