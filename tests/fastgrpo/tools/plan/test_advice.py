"""`fastgrpo plan --advise`: what it names fits as a recipe of its own, the least given up first."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.costs import disk
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan
from fastgrpo.tools.plan.tuning import choices, search
from fastgrpo.tools.plan.tuning.advice import Advice, advise
from tests import ROOT

LAUNCH = ROOT / "launch"
GIB = 2**30
LADDER = (
    "lora.rank",
    "rollout.window",
    "rollout.tail_steps",
    "rollout.steps",
    "prompts.per_iteration",
    "rollout.samples_per_prompt",
    "video.frames",
    "video.height",
    "video.width",
)


def plan(name: str, card: str, ram: float | None, *overrides: str) -> Plan:
    """On one GPU."""
    recipe = config.load(LAUNCH / f"{name}.toml", overrides)
    return planner.plan(recipe, 1, Machine(gpu(card), Achieved(), ram))


@pytest.fixture(scope="module")
def rungs() -> Iterator[list[Advice]]:
    """Stable Diffusion on an old card and a small host, to the last rung; small batches alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "LARGEST_BATCH", 2)
        yield advise(plan("t2i_sd", "3090", 24), within=0.0, text=None)


def test_every_rung_that_fits_is_a_recipe_that_fits(rungs: list[Advice]) -> None:
    """Read and planned anew from its overrides, on the GPU and in the host's memory."""
    fitting = [one for one in rungs if one.tuned is not None]
    assert fitting
    for one in fitting:
        again = plan("t2i_sd", "3090", 24, *one.overrides)
        assert one.tuned is not None and again.seconds == one.tuned.plan.seconds
        assert again.fits and again.worst.peak <= 0.95 * again.machine.usable()
        assert sum(again.host.values()) <= 0.9 * 24 * GIB


@pytest.mark.parametrize("card", ["4090", "h100"])
def test_the_first_advice_for_hunyuan_on_one_card_fits(card: str) -> None:
    """With all weights and the paper's own samples, whatever the seconds."""
    (only,) = advise(plan("t2v_hunyuan", card, None), within=1e9, text=None)
    again = plan("t2v_hunyuan", card, None, *only.overrides)
    assert only.given_up == () and again.fits and not plan("t2v_hunyuan", card, None).fits


def test_rungs_give_up_ever_more_in_order_of_fidelity(rungs: list[Advice]) -> None:
    keys = [[override.partition("=")[0] for override in one.given_up] for one in rungs]
    assert keys[0] == [] and keys[1] == ["lora.rank"]
    for before, after in pairwise(keys):
        assert set(before) <= set(after)
        assert [key for key in LADDER if key in after] == after
    assert set(keys[-1]) == set(LADDER) - {"video.frames"}  # a picture has no frames to give up
    seconds = [one.tuned.plan.seconds for one in rungs if one.tuned is not None]
    assert seconds == sorted(seconds, reverse=True)


def test_it_ends_with_the_first_that_is_quick_enough(rungs: list[Advice]) -> None:
    first, enough = next(
        (number, one.tuned.plan.seconds)
        for number, one in enumerate(rungs)
        if one.tuned is not None
    )
    found = advise(plan("t2i_sd", "3090", 24), within=enough, text=None)
    assert [one.given_up for one in found] == [one.given_up for one in rungs[: first + 1]]


def test_a_small_host_has_no_room_for_what_is_moved_there() -> None:
    """Wan's states do not fit on 24 GB, and fit in the host's memory where that is large enough."""
    given = plan("t2v_wan", "4090", None, "prompts.per_iteration=1")
    tuned = search.tune(given)
    assert tuned is not None and tuned.plan.host
    held = sum(tuned.plan.host.values()) / GIB
    assert not replace(tuned.plan, machine=replace(given.machine, ram_gib=held)).fits
    enough = replace(given, machine=replace(given.machine, ram_gib=held / 0.9 + 0.1))
    assert (again := search.tune(enough)) and again.overrides == tuned.overrides
    small = replace(given, machine=replace(given.machine, ram_gib=4.0))
    found = search.tune(small)
    assert found is None or sum(found.plan.host.values()) <= 0.9 * 4 * GIB


def test_disks_hold_the_checkpoints_that_there_are_at_once() -> None:
    """Masters and both moments in float32: two kept, the best, and one that is written."""
    found = disk.of_run(plan("t2v_hunyuan", "h800", None).subject)
    assert found["checkpoints"] == pytest.approx(4 * 12 * 12_821_012_544)
    adapted = disk.of_run(plan("t2v_hunyuan", "h800", None, "lora.rank=8").subject)
    assert adapted["checkpoints"] < 0.01 * found["checkpoints"]
    assert adapted["weights"] == found["weights"] > 2 * 12.8e9


def test_the_command_advises(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(LAUNCH / "t2i_sd.toml")
    machine = ["--gpus", "1", "--gpu", "h100", "--ram-gib", "64"]
    assert cli.main(["plan", file, *machine, "--advise", "100000"]) == 0
    shown = capsys.readouterr().out
    assert "what to give up, the least first" in shown and "disk: " in shown
    assert "the first that fits: " in shown
    assert cli.main(["plan", file, *machine, "--advise", "100000", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["advice"]
    assert only["given_up"] == [] and only["fits"]
