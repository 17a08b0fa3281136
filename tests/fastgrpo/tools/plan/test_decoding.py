"""The plan of a method that goes back through the decoder: its memory, its work, its refusal."""

import math

import pytest

from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB
from fastgrpo.models import declared
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.costs import decoding
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine, Phase
from tests import ROOT

REFL = ["objective.kind=refl", "rollout.shared_noise=false", "objective.timestep_fraction=0.0399"]
ONE_UPDATE = ["optimizer.updates_per_iteration=1"]


def recipe(name: str, *overrides: str) -> Recipe:
    return config.load(ROOT / "launch" / f"{name}.toml", [*REFL, *ONE_UPDATE, *overrides])


def update(asked: Recipe) -> Phase:
    found = planner.plan(asked, 8, Machine(gpu("h800"), Achieved()))
    assert any("decoder's graph" in line for line in planner.warnings(found))
    (phase,) = (phase for phase in found.phases if phase.name == "update")
    return phase


def test_an_images_graph_is_in_the_updates_memory_and_the_decoding_in_its_work() -> None:
    """FLUX draws images, which no tile cuts at 256 x 256: bytes and FLOPs by hand."""
    size = ("video.height=256", "video.width=256", "model.dtype=bfloat16")
    asked = recipe("t2i_flux", *size, "optimizer.batch_size=4", "model.decode_batch=2")
    vae = declared("flux", "AUXILIARY")
    phase = update(asked)
    assert phase.memory["decoder's graph"] == 2 * 256 * 256 * vae.graph_bytes
    plain = asked.model_copy(
        update={"objective": asked.objective.model_copy(update={"kind": "awm", "awm_average": 0.0})}
    )
    found = planner.plan(plain, 8, Machine(gpu("h800"), Achieved()))
    (other,) = (phase for phase in found.phases if phase.name == "update")
    assert "decoder's graph" not in other.memory
    states = asked.prompts.per_iteration * asked.rollout.samples_per_prompt / 8
    assert phase.flops > 3 * states * 256 * 256 * vae.decode_flops


def test_the_papers_videos_are_refused_with_the_number() -> None:
    """Its reason against ReFL for video: 53 frames of 480 x 480, all tiles' graphs at once."""
    asked = recipe("t2v_hunyuan")
    vae = declared("hunyuan_video", "AUXILIARY")
    kept = decoding.graph(vae, asked)
    assert kept > 53 * 480 * 480 * vae.graph_bytes  # overlaps are decoded twice
    with pytest.raises(UserError, match=rf"keeps {kept / GIB:,.0f} GiB for one of") as caught:
        decoding.check_graph(asked, vae)
    assert "or objective.kind=grpo." in str(caught.value)
    small = asked.model_copy(
        update={"video": asked.video.model_copy(update={"frames": 5, "height": 128, "width": 128})}
    )
    decoding.check_graph(small, vae)
    grpo = config.load(ROOT / "launch" / "t2v_hunyuan.toml")
    decoding.check_graph(grpo, vae)
    assert math.isclose(decoding.graph(vae, small), 5 * 128 * 128 * vae.graph_bytes)
