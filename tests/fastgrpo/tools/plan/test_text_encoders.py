"""A plan's text encoders: the way of each, what it takes, and what keeps it from it."""

from dataclasses import replace

import pytest

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB
from fastgrpo.models import declared
from fastgrpo.tools.plan import phases, planner, tables
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from tests import ROOT

LAUNCH = ROOT / "launch" / "t2v_hunyuan.toml"


def planned(memory_gib: float, ranks: int, *overrides: str) -> planner.Plan:
    machine = Machine(replace(gpu("4090"), memory_gib=memory_gib), Achieved())
    recipe = config.load(LAUNCH, ["distributed.offload=true", *overrides])  # no weights there
    return planner.plan(recipe, ranks, machine)


def ways(found: planner.Plan) -> dict[str, str]:
    placed = phases.text_encoders_of(found.subject, found.machine)
    return {one.text.name: one.way for one in placed}


@pytest.mark.parametrize(
    ("memory_gib", "ranks", "way"),
    [(23.5, 1, "whole"), (15.5, 2, "sharded"), (15.5, 1, "streamed"), (9.0, 2, "streamed")],
)
def test_the_llama_is_placed_as_there_is_room(memory_gib: float, ranks: int, way: str) -> None:
    found = planned(memory_gib, ranks)
    assert ways(found) == {"text_encoder_2": "whole", "text_encoder": way}
    load = next(phase for phase in found.phases if phase.name == "load")
    assert load.peak <= found.machine.usable()
    of_blocks = {"whole": 32.0, "sharded": 32 / ranks + 2, "streamed": 2.0}[way] * 218.1e6
    assert load.memory["text encoders"] == pytest.approx(2 * (525.6e6 + of_blocks))
    line = tables.encoders_line(found)
    peak = (load.memory["text encoders"] + load.memory["activations"]) / GIB
    assert f"{peak:,.1f} GiB" in line and "one after the other" in line


def test_what_is_asked_for_and_does_not_fit_is_told() -> None:
    found = planned(15.5, 1, "model.text_encoders=whole")
    load = next(phase for phase in found.phases if phase.name == "load")
    assert load.peak > found.machine.usable() and not found.fits
    assert "which does not fit" in tables.encoders_line(found)
    with pytest.raises(UserError, match=r"model\.text_encoders=sharded: there is one rank"):
        planned(23.5, 1, "model.text_encoders=sharded")


def test_moving_blocks_takes_the_time_of_the_way_that_they_take() -> None:
    found = planned(15.5, 1, "prompts.limit=20")
    seconds = phases.encoding_seconds(found.subject, found.machine)
    quick = replace(found.machine, card=replace(found.machine.card, tflops=1e9))
    moved = 32 * 2 * 32 * 218.1e6 / (25 * 1e9)  # 32 batches of 32 prompts over PCIe
    assert phases.encoding_seconds(found.subject, quick) == pytest.approx(moved, rel=1e-3)
    assert seconds >= moved


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("hunyuan_video", "llama_and_clip"),
        ("flux", "t5_and_clip"),
        ("stable_diffusion_3", "t5_and_two_clips"),
        ("wan", "umt5"),
        ("qwen_image", "qwen"),
        ("z_image", "qwen_3"),
        ("flux_2", "qwen_3"),
    ],
)
def test_a_plan_has_the_batches_of_the_encoders(family: str, module: str) -> None:
    source = (ROOT / "models" / "text_encoders" / f"{module}.py").read_text()
    (batch,) = (line for line in source.splitlines() if line.startswith("TEXT_BATCH = "))
    texts = {one.texts for one in declared(family, "AUXILIARY").texts}
    assert texts == {int(batch.split()[2])}
