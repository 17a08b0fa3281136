"""The contract of every reward in the folder, whatever its name: a reward that breaks it is named
with the rule.

`contract` gives the violations of one reward as lines of text. A reward with weights is tried with
tiny random ones.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastgrpo.rewards
from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, RewardSize, Scores
from tests.harness import endpoint, servers
from tests.harness.weights import clip
from tests.harness.weights import videoalign as videoalign_folder

FPS = 8.0
RATES = (0.5, 1.0, 7.5, 8.0, 24.0, 60.0)  # frames per second
LENGTHS = (*range(1, 12), 16, 17, 33, 53, 81, 128)  # frames
ROUNDING = 1e-5  # of networks, where the size of a batch may choose other kernels


def with_weights(name: str, write: Callable[[Path], object]) -> Callable[[Path], RewardSpec]:
    """A CLIP's tiny folder and the spec that names it."""

    def make(folder: Path) -> RewardSpec:
        write(folder)
        return RewardSpec(name=name, weights={}, path=str(folder), device="cpu")

    return make


def videoalign(folder: Path) -> RewardSpec:
    videoalign_folder.write(folder)
    return videoalign_folder.spec(folder)


def vlm_judge(folder: Path) -> RewardSpec:
    options = {
        "endpoints": endpoint.shared(),
        "model": endpoint.MODEL,
        "question": "Is {prompt} bright?",
    }
    return RewardSpec(name="vlm_judge", weights={}, frames=2, options=options)


def checklist(folder: Path) -> RewardSpec:
    folder.mkdir()
    spec = vlm_judge(folder)
    (folder / "questions").write_text("Is {prompt} bright?\nIs it not dark?\n")
    (folder / "weights").write_text("[1.0, 0.5]")
    files = {key: str(folder / key) for key in ("questions", "weights")}
    options = {key: value for key, value in spec.options.items() if key != "question"}
    options |= {"questions": files["questions"], "question_weights": files["weights"]}
    return spec.model_copy(update={"name": "checklist", "options": options})


def vision_reward(folder: Path) -> RewardSpec:
    """Answers of the clips that are tried; others, such as shorter ones, have no score."""
    folder.mkdir()
    rows = [
        {
            "pixels": sha256(clip.numpy().tobytes()).hexdigest(),
            "prompt": prompt,
            "yes": [p / 6] * 29,
        }
        for p, (clip, prompt) in enumerate(zip(servers.clips(), servers.CAPTIONS, strict=True), 1)
    ]
    (folder / "scores").write_text("\n".join(map(json.dumps, rows)))
    (folder / "weights").write_text(json.dumps([0.1] * 29))
    options = {
        "scores": str(folder / "scores"),
        "question_weights": str(folder / "weights"),
        "weights_sha256": sha256((folder / "weights").read_bytes()).hexdigest(),
    }
    return RewardSpec(name="vision_reward", weights={}, options=options)


WEIGHTS: dict[str, Callable[[Path], RewardSpec]] = {
    "hps": with_weights("hps", clip.write_hps),
    "clip_score": with_weights("clip_score", clip.write_open_clip),
    "pick_score": with_weights("pick_score", clip.write_transformers),
    "videoalign": videoalign,
    "vlm_judge": vlm_judge,
    "checklist": checklist,
    "vision_reward": vision_reward,
}
"""How a reward's tiny weights, or the endpoint that it asks, are made; a reward that needs none is not here."""


@dataclass(frozen=True)
class Case:
    """A reward, and the clips that it is tried with."""

    spec: RewardSpec
    reward: Reward
    pixels: Tensor  # uint8 [6, 9, 32, 32, 3]
    prompts: list[str]

    @property
    def least(self) -> int:
        return rewards.least_frames(self.spec)

    def scores(self, pixels: Tensor | None = None, prompts: list[str] | None = None) -> Scores:
        """Scores of these clips, or of others."""
        return self.reward(self.pixels if pixels is None else pixels, prompts or self.prompts, FPS)


def contract(spec: RewardSpec) -> list[str]:
    """What a reward breaks, each line beginning with the rule's name; empty for a good one."""
    try:
        reward = rewards.load(spec)
    except UserError as error:
        return [f"load: {error}"]
    case = Case(spec, reward, servers.clips(), servers.CAPTIONS)
    checks = (declaration, form, values, batches, odd_prompts, unread_prompts, frames, least_frames)
    return [f"{check.__name__}: {line}" for check in checks for line in check(case)]


def declaration(case: Case) -> Iterator[str]:
    """SIZE and LEAST_FRAMES are what the planner and the run take them for; a reload is the same
    reward.
    """
    size = rewards.declared(case.spec, "SIZE", None)
    if size is not None and (
        not isinstance(size, RewardSize) or min(size.parameters, size.tokens) <= 0
    ):
        yield f"SIZE is {size!r}, no RewardSize with parameters and tokens"
    if case.least < 1:
        yield f"LEAST_FRAMES is {case.least}"
    if rewards.load(case.spec).fingerprint != case.reward.fingerprint:
        yield "the fingerprint changes from one load to the next"


def form(case: Case) -> Iterator[str]:
    """Parts have names, and every part has float32 [B] scores."""
    names = case.reward.names
    if (
        not isinstance(names, tuple)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        yield f"names is {names!r}, no tuple of texts"
        return
    before = case.pixels.clone()
    scores, count = case.scores(), len(case.pixels)
    if not torch.equal(before, case.pixels):
        yield "the pixels are changed in place"
    if set(scores.values) != set(names):
        yield f"scores of {sorted(scores.values)} where names says {sorted(names)}"
    for part, column in scores.values.items():
        if column.dtype != torch.float32 or column.shape != (count,):
            yield f"{part} is {column.dtype} {list(column.shape)}, not float32 [{count}]"
    if scores.valid.dtype != torch.bool or scores.valid.shape != (count,):
        yield f"valid is {scores.valid.dtype} {list(scores.valid.shape)}, not bool [{count}]"


def values(case: Case) -> Iterator[str]:
    """Clips that differ have scores that differ, which no constant does."""
    scores = case.scores()
    yield from masked(scores)
    if not scores.valid.all():
        yield "a good clip has no score"
    if all(column.unique().numel() == 1 for column in scores.values.values()):
        yield "every clip has the same score in every part"


def masked(scores: Scores) -> Iterator[str]:
    """A clip is finite in every part, or NaN in every part and not valid."""
    for part, column in scores.values.items():
        if not column[scores.valid].isfinite().all():
            yield f"{part} is not finite in a valid clip"
        if not column[~scores.valid].isnan().all():
            yield f"{part} is a number, not NaN, in a clip without a score"


def batches(case: Case) -> Iterator[str]:
    """A clip's score is the same alone, in another order and beside other clips."""
    whole = table(case.scores())
    alone = [
        table(case.scores(case.pixels[i : i + 1], [case.prompts[i]])) for i in range(len(whole))
    ]
    if not close(torch.cat(alone), whole):
        yield "a clip alone has another score than in a batch"
    turned = table(case.scores(case.pixels.flip(0), case.prompts[::-1]))
    if not close(turned.flip(0), whole):
        yield "the order of a batch changes scores"


def odd_prompts(case: Case) -> Iterator[str]:
    """Odd prompts have a score or none, and change nothing for the clips beside them."""
    plain = table(case.scores())
    for odd in ("", " ", "word " * 5000, "<|VQ_reward|>", "\N{SNOWMAN}"):
        scores = case.scores(prompts=[odd, *case.prompts[1:]])
        yield from masked(scores)
        if not close(table(scores)[1:], plain[1:]):
            yield f"the prompt {odd[:20]!r} changes the scores of other clips"


def unread_prompts(case: Case) -> Iterator[str]:
    """A reward that says that it reads no prompts gives the same scores for others."""
    if not case.reward.reads_prompts and not torch.equal(
        table(case.scores()), table(case.scores(prompts=[""] * len(case.prompts)))
    ):
        yield "reads_prompts is False, and prompts change scores"


def frames(case: Case) -> Iterator[str]:
    """The frames used lie in the clip, are as many as a plan counts, and the others change
    nothing.
    """
    size = rewards.declared(case.spec, "SIZE", None)
    for length, fps in product((n for n in LENGTHS if n >= case.least), RATES):
        used = case.reward.frames_used(length, fps)
        indices = list(range(length)) if used is None else used
        if not indices or not set(indices) <= set(range(length)):
            yield f"frames_used({length}, {fps}) is {used}, not in the clip"
            return
        if isinstance(size, RewardSize) and size.frames_scored(case.spec, length, fps) != len(
            set(indices)
        ):
            yield f"a plan counts other frames than the {len(indices)} of frames_used({length}, {fps})"
    used = case.reward.frames_used(case.pixels.shape[1], FPS)
    if used is not None:
        black = torch.zeros_like(case.pixels)
        black[:, used] = case.pixels[:, used]
        if not torch.equal(table(case.scores(black)), table(case.scores())):
            yield "frames outside frames_used change scores"


def least_frames(case: Case) -> Iterator[str]:
    """The shortest clip that is judged has LEAST_FRAMES frames."""
    for length in range(1, max(case.least, 4) + 1):
        try:
            case.scores(case.pixels[:2, :length], case.prompts[:2])
            if length < case.least:
                yield f"a clip of {length} frames is judged, LEAST_FRAMES is {case.least}"
        except ValueError:
            if length >= case.least:
                yield f"a clip of {length} frames is refused, LEAST_FRAMES is {case.least}"


def table(scores: Scores) -> Tensor:
    """float32 [B, parts], NaN made a number that no score has, so that equal tables are equal."""
    return torch.stack(list(scores.values.values()), 1).nan_to_num(nan=-1e30)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", rewards.known())
def test_every_reward_keeps_the_contract(name: str, tmp_path: Path) -> None:
    spec = WEIGHTS[name](tmp_path / name) if name in WEIGHTS else rewards.plain(name)
    (tmp_path / name).mkdir(exist_ok=True)
    assert contract(spec) == []


# ---- planted rewards

PLANTED = """
import torch
from fastgrpo.core.reward import Reward, RewardSize, Scores

{top}

class Planted(Reward):
    names = ("A",)

    def frames_used(self, frames, fps):
        return [0]

    def __call__(self, pixels, prompts, fps):
        values = pixels[:, 0].flatten(1).float().mean(1)
        valid = torch.tensor([prompt.strip() != "" for prompt in prompts])
        values[~valid] = float("nan")
        {body}
        return Scores({{"A": values}}, valid)

{end}

def load(spec):
    return Planted()
"""

WITHOUT_BASE = """
class Plain:
    names = ("A",)

def load(spec):
    return Plain()
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> RewardSpec:
    """Make `folder` the folder of rewards, with this one, for one test."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.delitem(sys.modules, f"fastgrpo.rewards.{name}", raising=False)
    monkeypatch.setattr(fastgrpo.rewards, "FOLDER", folder)
    monkeypatch.setattr(fastgrpo.rewards, "__path__", [str(folder), *fastgrpo.rewards.__path__])
    return rewards.plain(name)


SIZE = "SIZE = RewardSize(parameters=1.0, tokens=1.0, frames_scored=lambda spec, frames, fps: {})"


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ({}, None),
        ({"top": SIZE.format(1)}, None),
        (
            {"top": SIZE.format("frames")},
            "frames: a plan counts other frames than the 1 of frames_used",
        ),
        ({"top": "SIZE = 1.0"}, "declaration: SIZE is 1.0, no RewardSize"),
        (
            {"body": "values = values - values.nanmean()"},
            "batches: a clip alone has another score than in a batch",
        ),
        (
            {"body": "values = values + torch.arange(len(values))"},
            "batches: the order of a batch changes scores",
        ),
        (
            {"body": "values[~valid] = -1.0"},
            "odd_prompts: A is a number, not NaN, in a clip without a score",
        ),
        ({"body": "valid[:] = True"}, "odd_prompts: A is not finite in a valid clip"),
        (
            {"body": "values = torch.zeros(len(pixels))"},
            "values: every clip has the same score in every part",
        ),
        ({"body": "values = values.double()"}, "form: A is torch.float64 [6], not float32 [6]"),
        ({"body": "values = values[:, None]"}, "form: A is torch.float32 [6, 1], not float32 [6]"),
        ({"body": "pixels += 1"}, "form: the pixels are changed in place"),
        (
            {"body": "values = values + pixels[:, -1].flatten(1).float().mean(1)"},
            "frames: frames outside frames_used",
        ),
        (
            {"body": "if len(pixels[0]) < 3: raise ValueError"},
            "least_frames: a clip of 1 frames is refused",
        ),
        (
            {"top": "LEAST_FRAMES = 3"},
            "least_frames: a clip of 1 frames is judged, LEAST_FRAMES is 3",
        ),
        ({"end": "Planted.names = ()"}, "form: names is (), no tuple of texts"),
        (
            {"end": "Planted.frames_used = lambda self, frames, fps: [frames]"},
            "frames: frames_used(1, 0.5) is [1]",
        ),
        (
            {"end": "Planted.reads_prompts = False"},
            "unread_prompts: reads_prompts is False, and prompts change scores",
        ),
        ({"end": "Planted.fingerprint = property(id)"}, "declaration: the fingerprint changes"),
    ],
    ids=lambda value: " ".join(value.values())[:40] if isinstance(value, dict) else "",
)
def test_a_planted_fault_is_named(
    fault: dict[str, str], broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PLANTED.format(**({"top": "", "body": "", "end": ""} | fault))
    violations = contract(plant(tmp_path, monkeypatch, "planted", text))
    if broken is None:
        assert violations == []
    else:
        assert any(line.startswith(broken) for line in violations), violations


def test_a_reward_without_the_base_class_is_refused_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = plant(tmp_path, monkeypatch, "without_base", WITHOUT_BASE)
    assert rewards.known() == ("without_base",)
    assert contract(spec) == [
        "load: rewards.name=without_base: load() returned a Plain, not a Reward; "
        "let it inherit fastgrpo.core.reward.Reward."
    ]


def test_the_registry_of_rewards_needs_no_torch() -> None:
    code = (
        "import sys; from fastgrpo import rewards; "
        "[(rewards.least_frames(spec), rewards.declared(spec, 'SIZE', None)) for spec in "
        "map(rewards.plain, rewards.known())]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
