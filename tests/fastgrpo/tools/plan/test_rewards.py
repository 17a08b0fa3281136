"""The plan's rewards: frames against the rewards' own files, GPUs against every rank's share,
refusals against `train`.

No GPU is asked: what a server or a rank holds is enumerated here rank by rank.
"""

import importlib
import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.checkpoint.resume import check_folder
from fastgrpo.core import config
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import Group, World
from fastgrpo.rewards import declared, least_frames, plain
from fastgrpo.rewards.common import frames
from fastgrpo.rewards.networks.videoalign.preprocess import frame_indices, view
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.costs import rewards
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.subject import subject
from fastgrpo.training.scoring import sources
from tests import ROOT

LAUNCH = ROOT / "launch"
HPS = "rewards=[{name='hps', weights={HPS=1.0}, %s}]"
WEIGHTS = 0.99e9 * 4


def recipe(*overrides: str) -> Recipe:
    return config.load(LAUNCH / "t2v_hunyuan.toml", overrides)


def world(gpus: int, sp: int = 1) -> World:
    mesh: Any = None
    return World(
        rank=0,
        size=gpus,
        device=torch.device("cpu"),
        mesh=mesh,
        sp=Group(mesh, 0, sp) if sp > 1 else None,
    )


def scored(spec: RewardSpec, length: int, fps: float) -> int:
    """Frames that the planner counts."""
    return int(declared(spec, "SIZE", None).frames_scored(spec, length, fps))


@pytest.mark.parametrize("where", ["process", "server"])
def test_a_judge_behind_an_endpoint_takes_nothing_of_the_gpus(where: str) -> None:
    asked = recipe(f"rewards=[{{name='vlm_judge', weights={{judge=1.0}}, where='{where}'}}]")
    assert rewards.of_node(subject(asked, 8, 8).job) == rewards.Load(0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["hps", "clip_score", "pick_score", "hpsv3", "geneval"])
@pytest.mark.parametrize("rule", [None, "all", "first", "middle", 1, 4, 100])
def test_frames_scored_are_those_that_the_reward_chooses(name: str, rule: Any) -> None:
    own = importlib.import_module(f"fastgrpo.rewards.{name}").FRAMES
    spec = RewardSpec(name=name, weights={}, frames=rule)
    assert scored(spec, 53, 8.0) == len(frames.choose(own if rule is None else rule, 53))


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 7.5, 8.0, 16.0, 24000 / 1001, 24.0, 30.0, 60.0])
def test_videoalign_looks_at_as_many_frames_as_the_planner_counts(fps: float) -> None:
    """Against what is cut out of the clip itself: the network's grid is half as deep as the frames
    are many.
    """
    spec = RewardSpec(name="videoalign", weights={})
    for length in range(least_frames(plain("videoalign")), 130):
        assert scored(spec, length, fps) == len(frame_indices(length, fps, 2.0)), length
    for length in (2, 3, 4, 5, 9, 53):
        seen = view(torch.zeros(length, 28, 28, 3, dtype=torch.uint8), fps, 2.0, 28 * 28)
        assert scored(spec, length, fps) == 2 * seen.grid[0]


def test_videoalign_judges_no_shorter_clip_than_it_declares() -> None:
    least = least_frames(plain("videoalign"))
    assert frame_indices(least, 8.0, 2.0) == [0, 1]
    with pytest.raises(ValueError, match=f"give at least {least}"):
        frame_indices(least - 1, 8.0, 2.0)


def test_a_plan_counts_the_flops_of_the_frames_that_are_scored() -> None:
    """Of 81 frames at 24 per second VideoAlign looks at 6, and at 20 where it is told 8 per
    second.
    """
    form = "rewards=[{name='videoalign', weights={VQ=1.0}, %s}]"
    for told, looked_at in (("where='process'", 6), ("where='process', fps=8.0", 20)):
        asked = recipe(form % told, "video.frames=81", "video.fps=24.0", "prompts.per_iteration=1")
        load = rewards.of_node(subject(asked, 1, 8).job)
        assert load.flops == pytest.approx(12 * 2 * 2.2e9 * 1300 * looked_at)


@pytest.mark.parametrize(
    ("where", "passing"),
    [
        ("where='process'", True),
        ("where='process', device='cuda'", False),
        ("where='process', device='cuda:2'", False),
        ("where='process', device='cuda:7'", False),  # a GPU of the node that has no rank
        ("where='process', device='cpu'", False),
        ("where='server'", False),
        ("where='server', device='cuda:3'", False),
    ],
)
@pytest.mark.parametrize("sp", [1, 2])
def test_every_ranks_clips_are_scored_where_the_recipe_says(
    where: str, passing: bool, sp: int
) -> None:
    """4 ranks of a node of 8 GPUs: where each one's weights and clips come to lie, then the busiest
    GPU.
    """
    asked, ranks = recipe(HPS % where, f"distributed.sp={sp}", "prompts.per_iteration=5"), 4
    spec, total = asked.rewards[0], 5 * 12
    weights, clips = dict.fromkeys(range(8), 0.0), Counter[int]()
    for rank in range(ranks):
        share = len(world(ranks, sp).share(total, rank // sp))
        own = math.ceil(share / sp)
        named = int(spec.device[5:]) if ":" in spec.device else None
        if spec.where == "process":
            place = rank if named is None else named
            weights[place] += WEIGHTS
            clips[place] += own
        else:
            place = named or 0
            weights[place] = WEIGHTS
            clips[place] += share // sp
    load = rewards.of_node(subject(asked, ranks, 8).job)
    busiest = max(weights[rank] for rank in range(ranks))
    if spec.device == "cpu":
        assert load == rewards.Load(0.0, 0.0, 0.0)
        return
    assert (load.passing, load.staying) == ((busiest, 0.0) if passing else (0.0, busiest))
    assert load.flops == pytest.approx(max(clips.values()) * 2 * 0.99e9 * (257 + 77))


def test_a_server_beside_the_trainer_keeps_its_weights_through_the_update() -> None:
    machine = Machine(gpu("h800"), Achieved())

    def weights(where: str) -> dict[str, float]:
        found = planner.plan(recipe(HPS % where), 8, machine)
        return {phase.name: phase.memory["rewards"] for phase in found.phases}

    scoring_phases = dict.fromkeys(("rollout", "decode", "reward"), WEIGHTS)
    assert (
        weights("where='server'")
        == dict.fromkeys(("load", "update", "save"), WEIGHTS) | scoring_phases
    )
    assert (
        weights("where='process'")
        == dict.fromkeys(("load", "update", "save"), 0.0) | scoring_phases
    )


def test_what_cannot_be_scored_is_refused_by_plan_and_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server beside the first rank serves one node."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    asked = recipe(HPS % "where='server'")
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=r"server\.urls: none, and the run spans several nodes"),
    ):
        sources._servers(asked, list(asked.rewards), world(16), stack)
    with pytest.raises(
        UserError,
        match=r"server\.urls: none, and the run spans 2 nodes.* rewards\.0\.where=process\.",
    ):
        planner.plan(asked, 16, Machine(gpu("h800"), Achieved()))
    token = tmp_path / "token"
    elsewhere = recipe(HPS % "where='server', urls=['http://h:1']", f"server.token_file={token}")
    assert rewards.of_node(subject(elsewhere, 16, 8).job) == rewards.Load(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("gpus", "sp"), [(376, 1), (384, 1), (392, 1), (400, 1), (768, 2), (784, 2), (1024, 2)]
)
def test_too_few_samples_are_refused_by_plan_and_train(tmp_path: Path, gpus: int, sp: int) -> None:
    asked = recipe(f"distributed.sp={sp}", "distributed.shard=8", f"run.dir={tmp_path}")

    def refusal(action: Any) -> str | None:
        try:
            action()
        except UserError as error:
            return str(error).split(";")[0]
        return None

    by_train = refusal(lambda: check_folder(asked, world(gpus, sp)))
    assert refusal(lambda: planner.plan(asked, gpus, Machine(gpu("h800"), Achieved()))) == by_train
    assert (by_train is not None) == (gpus / sp > 384)
