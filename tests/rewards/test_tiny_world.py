"""The tiny world's rewards on clips whose right answer is known: drawn ones, and drawn ones damaged
in one way.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastgrpo import rewards
from fastgrpo.data.tiny_world import shapes
from fastgrpo.data.tiny_world.shapes import Meaning
from fastgrpo.rewards.tiny_world import look, shape_match

Clips = NDArray[np.uint8]  # [B, F, N, N, 3]
Marks = NDArray[np.float32]  # [B, 3]

TRAINING, HELD_OUT = shapes.meanings()
MEANINGS = (TRAINING + HELD_OUT)[::3]  # 48, with everything in them
CAPTIONS = [shapes.caption(meaning, i) for i, meaning in enumerate(MEANINGS)]
PARTS = ("VQ", "MQ", "TA")
BACKGROUND = np.array(shapes.BACKGROUND)


def drawn(size: int = shapes.CANVAS) -> Clips:
    rng = np.random.default_rng(0)
    return np.stack(
        [
            shapes.draw(m, size=size, start=shapes.random_start(m, shapes.FRAMES, rng))
            for m in MEANINGS
        ]
    )


def score(
    clips: NDArray[np.float64] | Clips, captions: list[str] | None = None, fps: float = shapes.FPS
) -> Marks:
    """Scores [B, 3] in the order of PARTS; all must be valid and in [0, 1]."""
    pixels = torch.from_numpy(np.clip(np.round(clips), 0, 255).astype(np.uint8))
    result = rewards.load(rewards.plain("tiny_world"))(
        pixels, CAPTIONS if captions is None else captions, fps
    )
    assert result.valid.all()
    table = torch.stack([result.values[part] for part in PARTS], 1)
    assert table.dtype == torch.float32
    assert ((table >= 0) & (table <= 1)).all()
    marks: Marks = table.numpy()
    return marks


def along(meaning: Meaning, velocity: tuple[float, float]) -> Clips:
    """A clip of the meaning's object on a straight path through the middle, at another velocity."""
    steps = np.arange(shapes.FRAMES, dtype=np.float64)[:, None] - 4
    return paint(meaning, shapes.CANVAS / 2 + np.array(velocity, dtype=np.float64) * steps)


def paint(meaning: Meaning, path: NDArray[np.float64]) -> Clips:
    mask = shapes.shape_mask(meaning.shape, path, shapes.CANVAS)[..., None]
    pixels: Clips = np.round(
        mask * np.array(shapes.COLOURS[meaning.colour]) + (1 - mask) * BACKGROUND
    ).astype(np.uint8)
    return pixels


def blurred(clips: Clips, sigma: float) -> NDArray[np.float64]:
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    kernel /= kernel.sum()
    result = clips.astype(np.float64)
    for axis in (2, 3):
        wide = np.pad(result, [(6, 6) if a == axis else (0, 0) for a in range(5)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(wide, 13, axis=axis)
        result = windows @ kernel
    return result


def next_in(table: dict[str, object] | tuple[str, ...], key: str) -> str:
    keys = list(table)
    return keys[(keys.index(key) + 1) % len(keys)]


def recaptioned(field: str, table: dict[str, object] | tuple[str, ...]) -> list[str]:
    """Captions that ask for something else in one field."""
    return [
        shapes.caption(replace(m, **{field: next_in(table, getattr(m, field))}), i)
        for i, m in enumerate(MEANINGS)
    ]


@pytest.mark.parametrize("size", [32, 64])
def test_drawn_clips_score_high_on_every_part(size: int) -> None:
    assert score(drawn(size)).min() >= 0.93


def test_blur_lowers_quality_step_by_step_and_leaves_motion() -> None:
    clips = drawn()
    means = [
        score(blurred(clips, sigma) if sigma else clips).mean(0) for sigma in (0.0, 0.8, 1.2, 2.0)
    ]
    vq, mq, ta = np.array(means).T
    assert (np.diff(vq) < -0.15).all() and vq[
        -1
    ] > 0.05  # no plateau: worse is lower, and never nothing
    assert (np.diff(ta) < -0.01).all() and ta[-1] > 0.5
    assert abs(np.diff(mq)).max() < 0.02


def test_noise_lowers_quality_most() -> None:
    clips = drawn()
    noise = np.random.default_rng(1).normal(0.0, 1.0, clips.shape)
    clean, faint, strong = (score(clips + s * noise).mean(0) for s in (0.0, 3.0, 8.0))
    assert clean[0] - faint[0] > 0.05 and faint[0] - strong[0] > 0.2
    assert abs(strong - clean)[1:].max() < 0.03  # path and content are still there


def test_a_dirty_background_is_seen_away_from_the_object() -> None:
    clips = drawn().astype(np.float64)
    clips[:, :, :3] += 40.0
    drop = score(drawn()).mean(0) - score(clips).mean(0)
    assert drop[0] > 0.3


def test_frozen_clip_has_no_motion() -> None:
    frozen = np.repeat(drawn()[:, 4:5], shapes.FRAMES, axis=1)
    scores = score(frozen)
    assert scores[:, 1].max() < 0.1
    assert scores[:, 0].min() >= 0.9  # it is as good to look at as before
    assert (score(drawn())[:, 2] - scores[:, 2]).min() > 0.3  # it moves in no direction


@pytest.mark.parametrize(("factor", "most"), [(2.0, 0.35), (0.5, 0.35), (1.25, 0.85), (0.75, 0.75)])
def test_wrong_speed_lowers_motion_only(factor: float, most: float) -> None:
    clips = np.stack([along(m, (m.velocity[0] * factor, m.velocity[1] * factor)) for m in MEANINGS])
    scores = score(clips)
    assert scores[:, 1].max() < most and scores[:, 1].min() > 0.15
    assert scores[:, 2].min() > 0.93


def test_speed_is_per_second() -> None:
    assert score(drawn()[:, ::2], fps=shapes.FPS / 2)[:, 1].min() > 0.93
    assert score(drawn(), fps=shapes.FPS / 2)[:, 1].max() < 0.35


def test_jitter_lowers_motion_step_by_step() -> None:
    jitter = np.random.default_rng(2).normal(0.0, 1.0, (shapes.FRAMES, 2))
    paths = [shapes.path(m, shapes.FRAMES) for m in MEANINGS]
    means = [
        score(
            np.stack([paint(m, path + s * jitter) for m, path in zip(MEANINGS, paths, strict=True)])
        ).mean(0)
        for s in (0.0, 0.2, 0.4, 0.8)
    ]
    assert (np.diff(np.array(means)[:, 1]) < -0.1).all()
    assert abs(np.array(means)[:, 0] - means[0][0]).max() < 0.03


def test_shuffled_frames_lower_motion_and_leave_quality() -> None:
    clips = drawn()
    before, after = score(clips), score(clips[:, [3, 7, 0, 5, 8, 1, 6, 2, 4]])
    assert after[:, 1].max() < 0.1
    assert np.allclose(after[:, 0], before[:, 0], atol=1e-6)


def test_a_missing_frame_lowers_motion() -> None:
    clips = drawn()
    clips[:, 4] = BACKGROUND
    assert score(clips)[:, 1].max() < 0.4


def test_wrong_colour_lowers_alignment_only() -> None:
    before, after = score(drawn()), score(drawn(), recaptioned("colour", dict(shapes.COLOURS)))
    assert (before - after)[:, 2].min() > 0.35
    assert np.array_equal(before[:, :2], after[:, :2])
    repainted = [
        shapes.draw(
            replace(m, colour=next_in(dict(shapes.COLOURS), m.colour)),
            start=tuple(shapes.path(m, shapes.FRAMES)[0]),
        )
        for m in MEANINGS
    ]
    scores = score(np.stack(repainted))  # now the pixels are wrong, not the caption
    assert scores[:, :2].min() > 0.93 and scores[:, 2].max() < 0.6


def test_colour_alignment_is_graded() -> None:
    clips = np.stack([shapes.draw(m) for m in MEANINGS]).astype(np.float64)
    other = np.stack(
        [shapes.draw(replace(m, colour=next_in(dict(shapes.COLOURS), m.colour))) for m in MEANINGS]
    )
    marks = [
        score((1 - mix) * clips + mix * other).mean(0)
        for mix in (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
    ]
    vq, mq, ta = np.array(marks).T
    assert (np.diff(ta) < -0.005).all()
    # halfway is no colour of the palette, the end is one
    assert vq[0] - vq[3] > 0.15 and abs(vq[-1] - vq[0]) < 0.02
    assert abs(np.diff(mq)).max() < 0.01


def test_wrong_shape_lowers_alignment_only() -> None:
    before, after = score(drawn()), score(drawn(), recaptioned("shape", shapes.SHAPES))
    assert (before - after)[:, 2].min() > 0.25
    assert np.array_equal(before[:, :2], after[:, :2])


def test_wrong_direction_lowers_alignment_only() -> None:
    opposite = [
        shapes.caption(replace(m, direction=OPPOSITE[m.direction]), i)
        for i, m in enumerate(MEANINGS)
    ]
    across = recaptioned("direction", tuple(ACROSS))
    right, wrong, worse = score(drawn()), score(drawn(), across), score(drawn(), opposite)
    assert (right - wrong)[:, 2].min() > 0.3 and (wrong - worse)[:, 2].min() > 0.05
    assert np.array_equal(right[:, :2], worse[:, :2])


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
ACROSS = ("left", "up", "right", "down")  # each is across the one before it


def test_two_objects_are_not_one() -> None:
    clips = np.stack([shapes.draw(m, start=(8.0, 16.0)) for m in MEANINGS])
    two = np.maximum(clips, np.roll(clips, 16, axis=3))
    assert score(two)[:, 0].max() < 0.2


def test_empty_clip_scores_nothing() -> None:
    empty = np.broadcast_to(BACKGROUND.astype(np.uint8), drawn().shape)
    assert score(empty).max() == 0.0
    assert (
        score(np.random.default_rng(3).integers(0, 256, empty.shape, dtype=np.uint8))[:, 0].max()
        < 0.01
    )


def test_shape_overlap_finds_the_shape_that_was_drawn() -> None:
    for meaning, clip in zip(MEANINGS, drawn(), strict=True):
        marks = {
            shape: shape_match(look(torch.from_numpy(clip)), shape).item()
            for shape in shapes.SHAPES
        }
        assert max(marks, key=lambda shape: marks[shape]) == meaning.shape


def test_a_clip_scores_the_same_alone_and_in_any_batch() -> None:
    clips = torch.from_numpy(np.clip(blurred(drawn(), 0.9), 0, 255).astype(np.uint8))
    reward = rewards.load(rewards.plain("tiny_world"))
    together = reward(clips, CAPTIONS, shapes.FPS)
    # at an odd address
    odd = torch.empty(clips[0].numel() + 1, dtype=torch.uint8)[1:].view(clips[0].shape)
    for i, caption in enumerate(CAPTIONS):
        alone = reward(odd.copy_(clips[i])[None], [caption], shapes.FPS)
        assert all(torch.equal(alone.values[part][0], together.values[part][i]) for part in PARTS)


def test_a_prompt_of_another_world_is_invalid() -> None:
    reward = rewards.load(rewards.plain("tiny_world"))
    result = reward(torch.from_numpy(drawn()[:2]), [CAPTIONS[0], "a cat plays the piano"], 8.0)
    assert result.valid.tolist() == [True, False]
    assert all(result.values[part].isnan().tolist() == [False, True] for part in PARTS)


def test_unfit_arguments_are_named() -> None:
    reward = rewards.load(rewards.plain("tiny_world"))
    clips = torch.from_numpy(drawn()[:2])
    for pixels, prompts, fps, message in (
        (clips.float(), CAPTIONS[:2], 8.0, "expected torch.uint8"),
        (clips[:, :1], CAPTIONS[:2], 8.0, "at least 3 frames"),
        (clips[:, :, :16], CAPTIONS[:2], 8.0, "equal sides"),
        (clips, CAPTIONS[:1], 8.0, "one prompt for each"),
        (clips, CAPTIONS[:2], 0.0, "fps=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            reward(pixels, prompts, fps)


def test_the_folder_is_the_registry() -> None:
    assert "tiny_world" in rewards.known() and not {"wire", "server", "client"} & set(
        rewards.known()
    )
    with pytest.raises(
        ValueError, match=r"rewards.name='tiny_word': no such reward. Did you mean tiny_world"
    ):
        rewards.load(rewards.plain("tiny_word"))


def test_speed_of_scoring() -> None:
    clips, reward = torch.from_numpy(drawn()), rewards.load(rewards.plain("tiny_world"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        reward(clips, CAPTIONS, shapes.FPS)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / len(clips) < 0.02  # 2 ms on an idle core; the margin is for busy machines
