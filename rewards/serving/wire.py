"""The bytes between the trainer and the reward server.

Request: the safetensors format, one uint8 tensor `clip.<i>` [F, H, W, 3] per clip (sizes may
differ), and in its `__metadata__` one entry "request", the JSON of {"prompts": [...], "fps": ...,
"rewards": [...], "frames": [...], "rows": [...]}. "frames" may be absent; for each clip it is null,
or {"of": n, "at": [...]}: the tensor holds only those of n frames. "rows" may be absent; for each
clip it is the object of what its prompt's row says beside the text.

Answer: JSON {"scores": {reward: {part: [number or null]}}, "valid": {reward: [true or false]},
"identity": {reward: text}}. A float32 is written as the decimal number that reads back to its exact
bits; null is NaN. A valid clip may lack the score of a part, but not of all.

`decode_request` trusts nothing: sizes are held against the caps below before anything of that size
is made, the tensors must fill the body exactly, and no code runs on either side (no pickle).
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fastgrpo.core.reward import PromptText, Scores, row_of

MAX_BODY = 256 * 2**20  # bytes; one 53 x 480 x 480 clip is 37 MB
MAX_HEADER = 16 * 64 * 2**10  # bytes, 1 MiB: room for MAX_CLIPS prompts of 3 KiB
MAX_CLIPS = 256
MAX_FRAMES = 256
MAX_PIXELS = 1280**2  # of a frame
MAX_REWARDS = 16
CONTENT_TYPE = "application/x-safetensors"


class WireError(ValueError):
    """Bytes that do not follow the format, or go beyond its caps."""


class OtherReward(WireError):
    """Scores of another reward of the same name than the one that was asked for."""


@dataclass(frozen=True)
class Clip:
    """The frames of a clip that were sent."""

    pixels: Tensor  # uint8 [len(at) or of, H, W, 3]
    of: int  # frames of the whole clip
    # which of them `pixels` holds, in increasing order. None: all
    at: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Request:
    """Clips that a client asks to have scored, by which rewards."""

    clips: list[Clip]  # views of the body
    prompts: list[str]
    fps: float
    rewards: list[str]


def refuse(where: str, wrong: str) -> NoReturn:
    """Raise WireError.  where: the part of the bytes that is wrong"""
    raise WireError(f"{where}: {wrong}")


def encode_request(
    clips: Sequence[Tensor],
    prompts: Sequence[str],
    fps: float,
    rewards: Sequence[str],
    at: Sequence[int] | None = None,
    of: int = 0,
) -> bytes:
    """The body of a request.

    clips: uint8 [F, H, W, 3] each, one for every prompt;  fps: frames per second
    at, of: indices of these frames, and how many there are, where they are frames of longer clips
    Raises WireError where they break the format's caps.
    """
    for i, clip in enumerate(clips):
        if clip.dtype != torch.uint8 or clip.ndim != 4:
            refuse(f"clip.{i}", f"expected uint8 [F, H, W, 3], got {clip.dtype} {list(clip.shape)}")
        check_shape(f"clip.{i}", list(clip.shape))
    if len(clips) != len(prompts):
        refuse("prompts", f"{len(prompts)} for {len(clips)} clips")
    request: dict[str, object] = {"prompts": list(prompts), "fps": fps, "rewards": list(rewards)}
    if at is not None:
        request["frames"] = [{"of": of, "at": list(at)}] * len(clips)
    if any(rows := [dict(row_of(prompt)) for prompt in prompts]):
        request["rows"] = rows
    text = json.dumps(request, ensure_ascii=False)
    entries: dict[str, object] = {"__metadata__": {"request": text}}
    position = 0
    for i, clip in enumerate(clips):
        end = position + clip.numel()
        entries[f"clip.{i}"] = {
            "dtype": "U8",
            "shape": list(clip.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        header = json.dumps(entries, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        refuse("prompts", "one is no Unicode text")
    header += b" " * (-len(header) % 8)
    total = 8 + len(header) + position
    if len(header) > MAX_HEADER or total > MAX_BODY:
        refuse(
            "body",
            f"{total} bytes, {len(header)} of them header, above {MAX_BODY} or {MAX_HEADER}; send "
            "fewer clips",
        )
    # by hand: the library copies pixels twice, and refuses to write a tensor that is there twice
    pixels = [np.ascontiguousarray(clip.cpu().numpy()).data.cast("B") for clip in clips]
    return b"".join([struct.pack("<Q", len(header)), header, *pixels])


def decode_request(body: bytearray) -> Request:
    """The request in a body, whose memory the clips share.

    Raises WireError for anything but a well-formed request.
    """
    if not 8 < len(body) <= MAX_BODY:
        refuse("body", f"{len(body)} bytes, expected 9 to {MAX_BODY}")
    (length,) = struct.unpack("<Q", body[:8])
    if length > min(MAX_HEADER, len(body) - 8):
        refuse("header", f"{length} bytes, expected at most {min(MAX_HEADER, len(body) - 8)}")
    header = read_json("header", bytes(body[8 : 8 + length]))
    request = decode_metadata(header.pop("__metadata__", None))
    prompts = with_rows(texts("prompts", request.get("prompts"), MAX_CLIPS), request.get("rows"))
    if len(header) != len(prompts):
        refuse("header", f"{len(header)} tensors for {len(prompts)} prompts")
    frames = decode_frames(request.get("frames"), len(prompts))
    clips: list[Clip] = []
    spans: list[tuple[int, int]] = []
    start = 8 + length
    for i in range(len(prompts)):
        shape, begin, end = decode_entry(f"clip.{i}", header.get(f"clip.{i}"))
        if start + end > len(body):
            refuse(f"clip.{i}", "ends behind the end of the body")
        pixels = torch.frombuffer(
            body, dtype=torch.uint8, count=end - begin, offset=start + begin
        ).view(shape)
        of, at = frames[i] or (shape[0], None)
        if at is not None and len(at) != shape[0]:
            refuse(f"clip.{i}", f"{shape[0]} frames where {len(at)} are named")
        clips.append(Clip(pixels, of, at))
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            refuse("header", "tensors overlap or leave a gap")
        position = end
    if start + position != len(body):
        refuse("body", "has bytes that belong to no tensor")
    rewards = texts("rewards", request.get("rewards"), MAX_REWARDS)
    if len(set(rewards)) != len(rewards):
        refuse("rewards", "one appears twice")
    return Request(clips, prompts, decode_fps(request.get("fps")), rewards)


def read_json(where: str, data: bytes) -> dict[str, object]:
    """A JSON object, without repeated keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) != len(pairs):
            refuse(where, "a key appears twice")
        return dict(pairs)

    def no_constant(name: str) -> NoReturn:
        refuse(where, f"{name} is no JSON number")

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant
        )
    except WireError:
        raise
    except (ValueError, RecursionError):
        raise WireError(f"{where}: not JSON") from None
    if not isinstance(value, dict):
        refuse(where, "not a JSON object")
    return value


def decode_metadata(metadata: object) -> dict[str, object]:
    """The JSON of `__metadata__`'s "request"."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get("request"), str):
        refuse("__metadata__", "no text 'request'")
    return read_json("request", metadata["request"].encode("utf-8", "surrogatepass"))


def decode_fps(fps: object) -> float:
    """Frames per second, above 0."""
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        refuse("fps", "not a number above 0")
    return float(fps)


def decode_frames(value: object, count: int) -> list[tuple[int, tuple[int, ...]] | None]:
    """(of, at) of each clip. None: the clip was sent whole."""
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        refuse("frames", f"not a list of {count}")
    return [None if entry is None else decode_choice(entry) for entry in value]


def decode_choice(entry: object) -> tuple[int, tuple[int, ...]]:
    """(of, at) of one clip: the frames of the whole clip, the indices of those that were sent."""
    of, at = (entry.get("of"), entry.get("at")) if isinstance(entry, dict) else (None, None)
    if (
        type(of) is not int
        or not 1 <= of <= MAX_FRAMES
        or not isinstance(at, list)
        or not 1 <= len(at) <= of
    ):
        refuse("frames", "no numbers 'of' and 'at'")
    at = integers("frames", at, len(at))
    if at[0] < 0 or at[-1] >= of or any(b <= a for a, b in pairwise(at)):
        refuse("frames", "'at' does not rise from 0 to below 'of'")
    return of, tuple(at)


def texts(where: str, value: object, most: int) -> list[str]:
    """A list of 1 to `most` texts."""
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        refuse(where, f"not a list of 1 to {most} texts")
    if not all(isinstance(item, str) for item in value):
        refuse(where, "holds something that is no text")
    try:
        "".join(value).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        refuse(where, "holds something that is no Unicode text")
    return value


def with_rows(prompts: list[str], rows: object) -> list[str]:
    """The prompts with what their rows say. rows: as a request has it; None: nothing"""
    if rows is None:
        return prompts
    if not isinstance(rows, list) or len(rows) != len(prompts):
        refuse("rows", f"not a list of {len(prompts)}")
    if not all(isinstance(row, dict) for row in rows):
        refuse("rows", "holds something that is no object")
    return [PromptText(text, row) for text, row in zip(prompts, rows, strict=True)]


def decode_entry(name: str, entry: object) -> tuple[list[int], int, int]:
    """Shape, begin and end of a tensor's entry in the header.

    The span has as many bytes as the shape needs.
    """
    if not isinstance(entry, dict):
        refuse(name, "not in the header")
    if entry.get("dtype") != "U8":
        refuse(name, "dtype is not U8")
    shape = integers(name, entry.get("shape"), 4)
    check_shape(name, shape)
    begin, end = integers(name, entry.get("data_offsets"), 2)
    if end - begin != math.prod(shape) or begin < 0:
        refuse(name, f"{end - begin} bytes for shape {shape}")
    return shape, begin, end


def integers(where: str, value: object, count: int) -> list[int]:
    """A list of `count` integers."""
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(type(item) is int for item in value)
    ):
        refuse(where, f"not a list of {count} integers")
    return value


def check_shape(where: str, shape: list[int]) -> None:
    """Raise WireError where a shape is not [F, H, W, 3] within the caps."""
    frames, height, width, channels = shape
    if not (
        1 <= frames <= MAX_FRAMES
        and height >= 1
        and width >= 1
        and height * width <= MAX_PIXELS
        and channels == 3
    ):
        refuse(
            where,
            f"shape {shape}, expected [F, H, W, 3] with F <= {MAX_FRAMES} and H x W <= "
            f"{MAX_PIXELS}",
        )


def encode_scores(scores: dict[str, Scores], identities: Mapping[str, str]) -> bytes:
    """The answer to a request.

    identities: that of each reward, see `Served.identity`
    """
    return json.dumps(
        {
            "scores": {
                reward: {
                    part: [None if math.isnan(x) else x for x in values.tolist()]
                    for part, values in result.values.items()
                }
                for reward, result in scores.items()
            },
            "valid": {reward: result.valid.tolist() for reward, result in scores.items()},
            "identity": {reward: identities[reward] for reward in scores},
        },
        allow_nan=False,
    ).encode()


def decode_scores(
    body: bytes,
    rewards: Sequence[str],
    count: int,
    expected: Mapping[str, Sequence[str]] | None = None,
    identities: Mapping[str, str] | None = None,
) -> dict[str, Scores]:
    """The answer for `count` clips, float32 [count] for each part.

    expected, identities: parts and identity of each reward, where they are known
    Raises OtherReward for another identity, WireError where a reward or a part is missing, a list
    has another length, a score is neither a finite float32 nor null, an invalid clip has one, or a
    valid one has none.
    """
    answer = read_json("answer", body)
    result: dict[str, Scores] = {}
    for reward in rewards:
        parts, valid = entry(answer.get("scores"), reward), entry(answer.get("valid"), reward)
        if identities is not None and entry(answer.get("identity"), reward) != identities[reward]:
            raise OtherReward(reward)
        if not isinstance(parts, dict) or not parts:
            refuse("answer", f"no scores of '{reward}'")
        if expected is not None and sorted(parts) != sorted(expected[reward]):
            refuse("answer", f"other parts of '{reward}' than {', '.join(expected[reward])}")
        if (
            not isinstance(valid, list)
            or len(valid) != count
            or not all(type(v) is bool for v in valid)
        ):
            refuse("answer", f"'valid' of '{reward}' is not a list of {count} true or false")
        values: dict[str, Tensor] = {}
        for part, column in parts.items():
            if not isinstance(column, list) or len(column) != count:
                refuse("answer", f"{reward}/{part} is not a list of {count}")
            if not all(x is None or (v and number(x)) for x, v in zip(column, valid, strict=True)):
                refuse("answer", f"{reward}/{part} has no number, or one of an invalid clip")
            values[part] = torch.tensor(
                [math.nan if x is None else x for x in column], dtype=torch.float32
            )
        stated = torch.tensor(valid, dtype=torch.bool)
        if (stated & torch.stack(list(values.values())).isnan().all(0)).any():
            refuse("answer", f"'{reward}' has no score of a valid clip")
        result[reward] = Scores(values, stated)
    return result


def entry(table: object, key: str) -> object:
    """A value of a JSON object. None: there is none, or the table is no object."""
    return table.get(key) if isinstance(table, dict) else None


def number(x: object) -> bool:
    """Whether x is a finite float32."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2.0**128
