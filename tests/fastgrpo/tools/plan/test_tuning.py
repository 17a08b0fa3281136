"""`fastgrpo plan --tune`: against every plan of its space, and against what a resumed run accepts."""

import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from fastgrpo.checkpoint import resume
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.tools.plan import phases, planner
from fastgrpo.tools.plan.gpus import GPUS, Achieved, changed, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan
from fastgrpo.tools.plan.subject import Subject
from fastgrpo.tools.plan.tuning import alternatives, choices, search
from fastgrpo.tools.plan.workload import network_calls
from tests import ROOT

LAUNCH = ROOT / "launch"


def plan(name: str, gpus: int, card: str, *overrides: str) -> Plan:
    recipe = config.load(LAUNCH / f"{name}.toml", overrides)
    return planner.plan(recipe, gpus, Machine(gpu(card), Achieved()))


def every_choice(given: Plan) -> list[choices.Choice]:
    """The whole space that is searched."""
    recipe = given.subject.job.recipe
    found: list[choices.Choice] = []
    for frame in choices.frames(given.subject):
        samples = network_calls.busiest(recipe, given.subject.job.gpus // frame["distributed.sp"])[
            0
        ]
        sizes = choices.batches(recipe, samples)
        updates = [choice for line in choices.recomputing() for choice in line]
        parts = sizes.together, sizes.drawn, sizes.trained, choices.drawing(recipe), updates
        for several in product(*map(list, parts)):
            found.append({**frame, **{k: v for one in several for k, v in one.items()}})
    return found


def test_no_key_changes_results() -> None:
    """As a resumed run says, which refuses those that would."""
    free = {*resume.FREE_TO_CHANGE, *resume.FREE_SECTIONS}
    given = plan("t2i_sd", 2, "h800")
    recipe = given.subject.job.recipe
    sizes = choices.batches(recipe, 8)
    lines = [choice for line in choices.recomputing() for choice in line]
    several = *choices.frames(given.subject), *choices.drawing(recipe), *lines
    keys = {key for choice in (*several, *sizes.drawn, *sizes.trained) for key in choice}
    for key in keys | set(choices.FRUGAL) | set(choices.QUICKEST):
        section, *_, name = key.split(".")
        of_rewards = section == "rewards" and name in resume.FREE_OF_REWARDS
        assert of_rewards or {key, section} & free, key


@pytest.mark.parametrize("card", ["4090", "h800"])
def test_no_plan_of_the_space_is_quicker(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of Stable Diffusion's on two GPUs, one by one, of a part of the space."""
    whole = choices.frames

    def few(subject: Subject) -> list[choices.Choice]:
        return [
            frame
            for frame in whole(subject)
            if frame["rollout.store"] == "device" and not frame["distributed.offload"]
        ]

    def shorter() -> list[list[choices.Choice]]:
        return [[line[0], line[9], line[-1]] for line in all_shares()]

    all_shares = choices.recomputing
    monkeypatch.setattr(choices, "frames", few)
    monkeypatch.setattr(choices, "recomputing", shorter)
    monkeypatch.setattr(choices, "LARGEST_BATCH", 1)
    given = plan("t2i_sd", 2, card, "rewards=[{name='hps',where='process',weights={HPS=1.0}}]")
    tuned = search.tune(given)
    assert tuned is not None and search.roomy(tuned.plan)
    plans = (search._tried(given, choice) for choice in every_choice(given))
    best = min(found.seconds for found in plans if found is not None and search.roomy(found))
    assert best <= tuned.plan.seconds <= best * (1 + search.WORTH)


@pytest.mark.parametrize("network_gbs", [50, 0.2])
def test_each_phase_is_the_quickest_that_fits(network_gbs: float) -> None:
    """Of one frame's values for rollout and update, all tried. The update feels recomputation
    where the network is fast, the rollout where the weights are where it is slow.
    """
    recipe = config.load(LAUNCH / "t2v_hunyuan.toml", ["rollout.samples_per_prompt=4"])
    card, achieved = changed(gpu("h800"), Achieved(), {"network_gbs": network_gbs})
    given = planner.plan(recipe, 64, Machine(card, achieved))
    frame = next(f for f in choices.frames(given.subject) if f["distributed.shard"] == "all")
    within, looked = partial(search._fits, given), search._Search(given)
    lines = [choice for line in choices.recomputing() for choice in line]
    update, drawing = looked._update(frame), looked._drawing(frame)
    assert update is not None and drawing is not None
    updates = [looked._updated(frame, choice) for choice in lines]
    trained = {one.seconds for one in updates if within(one)}
    assert update[0].seconds == min(trained)
    several = [
        phases.drawing_phases(looked._subject({**frame, **choice}), given.machine)
        for choice in choices.drawing(recipe)
    ]
    drawn = {search._seconds(two) for two in several if all(map(within, two))}
    assert search._seconds(drawing[0]) == min(drawn)
    assert len(trained if network_gbs == 50 else drawn) > 1


@pytest.mark.parametrize(
    ("name", "gpus", "card"), [("t2v_hunyuan", 64, "h800"), ("t2v_hunyuan", 8, "a100-40")]
)
def test_the_overrides_make_the_tuned_plan(name: str, gpus: int, card: str) -> None:
    """Pasted behind the command; each win is the difference to the plan without it."""
    plain = ("model.gradient_checkpointing=true", "model.keep=attention", "distributed.shard=none")
    given = plan(name, gpus, card, *plain)
    tuned = search.tune(given)
    assert tuned is not None
    again = plan(name, gpus, card, *plain, *tuned.overrides)
    assert again.seconds == tuned.plan.seconds
    assert again.worst.peak <= 0.95 * again.machine.usable()  # 5 % are left
    assert not given.fits or tuned.plan.seconds < given.seconds
    for win in tuned.wins:
        others = (o for o in tuned.overrides if o != win.override)
        without = plan(name, gpus, card, *plain, *others)
        assert win.seconds == without.seconds - again.seconds
        assert win.memory == without.worst.peak - again.worst.peak
        assert win.needed != search.roomy(without)


def test_batches_of_rollout_and_update_stay_alike_where_rounding_counts() -> None:
    """In bfloat16 with several optimizer steps; else they are free of each other."""
    together = plan("t2v_hunyuan", 8, "h800").subject.job.recipe
    pairs = [tuple(choice.values()) for choice in choices.batches(together, 8).together]
    assert pairs == [(1, 1), (2, 2), (4, 4), (8, 8)]
    for override in ("optimizer.updates_per_iteration=1", "model.dtype=float32"):
        apart = plan("t2v_hunyuan", 8, "h800", override).subject.job.recipe
        free = choices.batches(apart, 8)
        assert (len(free.together), len(free.drawn), len(free.trained)) == (1, 4, 4)


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in LAUNCH.glob("*.toml") if file.stem != "t2v_tiny")
)
def test_every_launch_file_has_an_answer_on_few_gpus(name: str) -> None:
    """The quickest that fits, or what to give up: what fits on the card with the least memory fits
    on all.
    """
    card = min(GPUS, key=lambda one: one.memory_gib)
    for gpus in (1, 2, 4, 8):
        given = plan(name, gpus, card.name)
        smallest = [{**alternatives.smaller(given, frames=1)[-1], "lora.rank": 8}]
        fits = search.fits_somehow(given)
        assert fits or alternatives._fitting(given, smallest, None), (card.name, gpus)


def test_what_is_given_up_is_the_mildest_that_fits() -> None:
    """HunyuanVideo's wide clips on 24 GB without adapters."""
    given = plan(
        "t2v_hunyuan", 1, "4090", "video.height=1280", "video.width=1280", "video.frames=129"
    )
    assert search.tune(given) is None
    found = alternatives.alternatives(given, None)
    assert found
    for one in found:
        assert search.roomy(one.tuned.plan)
    frames = [o for one in found for o in one.given_up if o.startswith("video.frames=")]
    for override in frames:
        more = int(override.partition("=")[2]) + 4
        milder = plan(
            "t2v_hunyuan",
            1,
            "4090",
            "video.height=1280",
            "video.width=1280",
            f"video.frames={more}",
        )
        assert not search.fits_somehow(milder)


def test_the_command_tunes(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(LAUNCH / "t2v_hunyuan.toml")
    machine = ["--gpus", "64", "--gpu", "h800"]
    assert cli.main(["plan", file, *machine, "--tune", "--lora", "32"]) == 0
    shown = capsys.readouterr().out
    assert "tuned, with the same results: " in shown and "another algorithm: " in shown
    assert cli.main(["plan", file, *machine, "--lora", "32"]) == 2
    assert "--lora=32: has no effect without --tune" in capsys.readouterr().err
    assert cli.main(["plan", file, "lora.rank=8", *machine, "--tune", "--lora", "32"]) == 2
    assert "--lora=32: the recipe trains adapters already" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.toml")), ids=lambda file: file.stem)
def test_launch_files_say_what_their_plan_says(file: Path) -> None:
    """Seconds and GiB on the GPUs that the file is meant for, with the margin left."""
    told = re.search(
        r"^# Plan: (\d+) x (\S+): (\S+) s .*, (\S+) GiB at the peak\.", file.read_text(), re.M
    )
    if file.stem == "t2v_tiny":
        assert told is None
        return
    assert told is not None
    found = plan(file.stem, int(told[1]), told[2])
    assert (f"{found.seconds:,.0f}", f"{found.worst.peak / 2**30:.1f}") == (told[3], told[4])
    assert found.worst.peak <= 0.95 * found.machine.usable()
