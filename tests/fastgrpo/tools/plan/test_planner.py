"""`fastgrpo plan`: shapes against diffusers' classes, bytes and FLOPs against runs, memory against
the simulation.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.models.loading.lora import ATTENTION
from fastgrpo.models.sizes.units import ADAPTED, adapters
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.tools.plan import phases, planner
from fastgrpo.tools.plan.costs import compute, memory
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.gpus import Achieved, changed, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.simulation import rank
from fastgrpo.tools.plan.subject import family_plan, published, subject
from fastgrpo.tools.plan.workload import network_calls
from tests import ROOT
from tests.harness import forks, tiny

LAUNCH = ROOT / "launch"
T2V = LAUNCH / "t2v_hunyuan.toml"
GIB = 2**30
FEWER = {"num_layers": 1, "num_single_layers": 1}
HUNYUAN = published("hunyuan_video")
LATENT = (16, 14, 60, 60)


PLAIN = (
    "model.gradient_checkpointing=true",
    "model.keep=attention",
    "distributed.shard=none",
)
"""Whatever the launch files are tuned to."""


def recipe(*overrides: str, name: str = "t2v_hunyuan") -> Recipe:
    return config.load(LAUNCH / f"{name}.toml", [*PLAIN, *overrides])


def job(
    settings: dict[str, Any],
    the_recipe: Recipe,
    gpus: int,
    latent: tuple[int, int, int, int],
    text: int,
) -> Job:
    planned = family_plan(the_recipe.model.family, settings)
    shards = mesh_shape(the_recipe.distributed, gpus, gpus)[1]
    return Job(
        recipe=the_recipe,
        network=planned.network,
        latent=latent,
        video=math.prod(latent[1:]) // planned.patch**2,
        text=text,
        gpus=gpus,
        ranks_per_node=8,
        replicas=gpus // shards,
        shards=shards,
    )


def test_an_evaluation_of_as_many_clips_takes_what_drawing_and_scoring_take() -> None:
    """Of independent noise, so that the rollout shares nothing either."""
    h800 = Machine(gpu("h800"), Achieved())
    alone = "rollout.shared_noise=false", "objective.best_of_n=none", "rollout.window=none"
    size = "prompts.per_iteration=32", "rollout.samples_per_prompt=12"
    same = "evaluate.prompts=32", "evaluate.seeds=12", "evaluate.every=4", "evaluate.steps=none"
    without = planner.plan(recipe(*alone, *size), 64, h800)
    found = planner.plan(recipe(*alone, *size, *same), 64, h800)
    own = {phase.name: phase.seconds for phase in found.phases}
    expected = own["rollout"] + own["decode"] + own["reward"]
    assert found.evaluation == pytest.approx(expected, rel=1e-9) and without.evaluation == 0
    assert found.seconds == pytest.approx(without.seconds + expected / 4, rel=1e-9)
    (line,) = [line for line in planner.warnings(found) if "held-out clips" in line]
    assert line.startswith("an evaluation of 384 held-out clips takes ") and "every 4 " in line
    half = recipe(*alone, *size, *same, "evaluate.seeds=6", "evaluate.steps=25", "rollout.steps=50")
    steps = planner.plan(half, 64, h800)
    rest = {phase.name: phase.seconds for phase in steps.phases}
    assert steps.evaluation == pytest.approx(
        rest["rollout"] / 4 + (rest["decode"] + rest["reward"]) / 2, rel=1e-9
    )


# --- shapes
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "named", "expected"),
    [
        ("hunyuan_video", "", 12_821_012_544),
        ("hunyuan_video_15", "", 8_326_608_160),
        ("hunyuan_video_15_i2v", "", 8_326_608_160),
        ("flux", "", 11_901_408_320),
        ("flux_2", "FLUX.2-klein-base-4B", 3_875_544_576),
        ("flux_2", "FLUX.2-klein-base-9B", 9_078_581_248),
        ("wan", "Wan2.1-T2V-14B", 14_288_491_584),
        ("wan", "Wan2.1-T2V-1.3B", 1_418_996_800),
        ("wan", "Wan2.2-TI2V-5B", 4_999_787_712),
        ("wan_i2v_14b", "Wan2.1-I2V-14B-480P", 16_394_878_784),
        ("wan_a14b", "Wan2.2-T2V-A14B", 2 * 14_288_491_584),
        ("wan_a14b_i2v", "Wan2.2-I2V-A14B", 2 * 14_288_901_184),
        ("stable_diffusion", "", 859_520_964),
        ("qwen_image", "", 20_430_401_088),
        ("z_image", "", 6_154_908_736),
        ("stable_diffusion_3", "stable-diffusion-3.5-medium", 2_243_171_520),
        ("stable_diffusion_3", "stable-diffusion-3.5-large", 8_056_627_520),
    ],
)
def test_published_networks_have_their_parameters(family: str, named: str, expected: int) -> None:
    """The classes' own counts, taken once on the meta device."""
    assert family_plan(family, published(family, named)).network.parameters == expected


@pytest.mark.parametrize(
    ("family", "named", "share"),
    [
        ("wan", "ti2v-5b", 0.453),
        ("wan_i2v", "", 0.453),
        ("hunyuan_video_15", "", 0.222),
        ("hunyuan_video_15_i2v", "", 0.222),
        ("wan_i2v_14b", "", 0.640),
        ("wan_a14b", "", 0.587),
        ("wan_a14b_i2v", "", 0.587),
        ("qwen_image", "", 0.222),
        ("z_image", "", 0.326),
        ("stable_diffusion_3", "", 0.256),
        ("stable_diffusion_3", "3.5-large", 0.223),
    ],
)
def test_default_adapters_are_in_every_block(family: str, named: str, share: float) -> None:
    """Their share of the linear weights is the one that docs/families.md tells."""
    network = family_plan(family, published(family, named)).network
    reached = [
        [p for p in unit.products if p.linear and p.name.endswith(ADAPTED)]
        for unit in network.units
    ]
    assert all(reached[: len(network.blocks)])
    assert all(".token_refiner." in p.name for p in reached[-1])
    every = sum(p.inputs * p.outputs for unit in network.units for p in unit.products if p.linear)
    own = sum(p.inputs * p.outputs for products in reached for p in products)
    assert own / every == pytest.approx(share, abs=5e-4)


def test_first_dimensions_are_padded_to_the_shards() -> None:
    """Wan's modulation tables have one row, of which eight ranks hold a row each; the rest
    divides.
    """
    net = family_plan("wan", published("wan", "1.3b")).network
    assert net.rest.padded(8) - net.rest.parameters == 7 * 2 * net.width
    assert net.blocks[0].padded(8) - net.blocks[0].parameters == 7 * 6 * net.width


def test_adapters_have_pefts_shapes() -> None:
    assert ADAPTED == ATTENTION
    settings = HUNYUAN | FEWER | {"num_attention_heads": 2, "num_refiner_layers": 1}
    with torch.device("meta"):
        real: Any = HunyuanVideoTransformer3DModel(**settings)
    from peft import LoraConfig

    real.add_adapter(LoraConfig(r=4, target_modules=list(ATTENTION)))
    expected = {n: tuple(p.shape) for n, p in real.named_parameters() if "lora_" in n}
    units = family_plan("hunyuan_video", settings).network.units
    assert {n: s for unit in units for n, s in adapters(unit, 4, ()).weights.items()} == expected


# --- FLOPs and bytes
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sp", "forward", "train", "exchanged"),
    [
        (1, 296.6, 1247, 0),
        (2, 150.0, 631, 13.0),
        (4, 76.7, 322, 9.7),
        (8, 40.1, 168, 5.7),
    ],
)
def test_work_of_hunyuan_video_on_64_ranks(
    sp: int, forward: float, train: float, exchanged: float
) -> None:
    """Against a simulation that another program made, of 480 x 480 x 53, FSDP over all ranks."""
    asked = recipe(f"distributed.sp={sp}", "distributed.shard=64", "model.keep=nothing")
    found = job(HUNYUAN, asked, 64, LATENT, 256)
    found = Job(**{**vars(found), "network": found.network.set_apart("context_embedder")})
    sent = compute.micro_batch(found, 1)
    assert compute.forward(found, 1).total / 1e12 == pytest.approx(forward, rel=0.005)
    assert compute.update(found, 1).total / 1e12 == pytest.approx(train, rel=0.005)
    assert sent.gather / GIB == pytest.approx(46.9, rel=0.002)
    assert sent.scatter / GIB == pytest.approx(47.0, rel=0.002)
    assert sent.exchange / GIB == pytest.approx(exchanged, abs=0.05)


def test_bytes_are_those_that_two_ranks_send(tmp_path: Path) -> None:
    """Of the tiny model, to the byte; the worker counts whole tensors, of which a ring sends (n -
    1) / n.
    """
    arguments = [str(tmp_path / "bytes"), json.dumps({"rollout_weights": "sharded"})]
    done = forks.run("tests.harness.workers.communication", arguments, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads((tmp_path / "bytes").read_text())
    settings = json.loads((tiny.FOLDER / "transformer" / "config.json").read_text())
    found = job(settings, recipe(name="t2v_tiny"), 2, (8, 3, 6, 10), 16)
    drawn = compute.gather_blocks(found, counted["forwards"])
    update = compute.micro_batch(found, 1).times(counted["micro_batches"])
    assert counted["rollout"] == {"all-gather": 2 * drawn.gather}
    assert counted["update"] == {
        "all-gather": 2 * update.gather,
        "reduce-scatter": 2 * update.scatter,
    }


@pytest.mark.parametrize("keep", ["attention", "products"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_simulated_rank_agrees(keep: str) -> None:
    """Hybrid sharding 2 x 2 with shared sequences, recomputation, bfloat16: memory within 5 %,
    FLOPs, bytes exact.
    """
    settings = HUNYUAN | {
        "num_attention_heads": 4,
        "attention_head_dim": 128,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 256,
    }
    mesh = ("distributed.sp=2", "distributed.shard=2")
    recomputed = ("model.gradient_checkpointing=true", f"model.keep={keep}")
    asked = recipe(*mesh, *recomputed, "rollout.batch_size=1")
    latent, text = (16, 5, 60, 60), 64
    exact = rank.simulate(asked, settings, rank.Sizes(latent, text), rank.Ranks(4, 8))
    closed = job(settings, asked, 4, latent, text)
    assert exact.update_peak == pytest.approx(
        sum(memory.update(closed, 1, False).values()), rel=0.05
    )
    assert exact.rollout_peak == pytest.approx(
        sum(memory.rollout(closed, 1, True).values()), rel=0.05
    )
    assert exact.forward_flops == pytest.approx(compute.forward(closed, 1).total, rel=0.001)
    assert exact.update_flops == pytest.approx(compute.update(closed, 1).total, rel=0.002)
    sent = compute.micro_batch(closed, 1)
    assert exact.update_sent == {
        "all-gather": sent.gather,
        "reduce-scatter": sent.scatter,
        "all-to-all": sent.exchange,
        "gather of tokens": sent.collect,
        "all-reduce": compute.between_replicas(closed).reduce,
    }


# --- plans
# --------------------------------------------------------------------------------------------------------


def machine(name: str) -> Machine:
    return Machine(gpu(name), Achieved())


def test_a_recipe_is_followed() -> None:
    """Each switch changes what it should, in the direction in which it should."""
    base = planner.plan(recipe(), 64, machine("h800"))

    def other(*overrides: str) -> planner.Plan:
        return planner.plan(recipe(*overrides), 64, machine("h800"))

    def parts(found: planner.Plan, phase: str) -> dict[str, float]:
        return next(p.memory for p in found.phases if p.name == phase)

    def seconds(found: planner.Plan, phase: str) -> float:
        return next(p.seconds for p in found.phases if p.name == phase)

    update = parts(base, "update")
    assert (
        parts(other("model.gradient_checkpointing=false"), "update")["activations"]
        > 10 * update["activations"]
    )
    assert (
        parts(other("model.gradient_checkpointing=2"), "update")["activations"]
        > 5 * update["activations"]
    )
    assert parts(other("distributed.sp=4"), "update")["activations"] < 0.5 * update["activations"]
    assert parts(other("distributed.shard=64"), "update")["optimizer"] == pytest.approx(
        update["optimizer"] / 8, rel=1e-3
    )
    assert parts(other("optimizer.batch_size=2"), "update")["activations"] == pytest.approx(
        2 * update["activations"], rel=0.01
    )
    assert "weights" not in parts(other("distributed.offload=true"), "update")
    assert parts(other("optimizer.ema_decay=0.9"), "update")["average"] == update["weights"]
    assert parts(other("objective.kl_weight=0.1"), "update")["initial policy"] == (
        update["weights"] + compute.gathered_bytes(base.subject.job, base.subject.job.network.rest)
    )
    assert parts(other("lora.rank=16"), "update")["optimizer"] < 0.01 * update["optimizer"]
    assert parts(other("rollout.store=host"), "update")["trajectories"] == 0
    sharded = parts(other("distributed.rollout_weights=sharded"), "rollout")["gathered"]
    assert sharded < 0.11 * parts(base, "rollout")["gathered"]  # two blocks, a buffer and the root
    assert seconds(other("model.cfg=2"), "rollout") == pytest.approx(
        2 * seconds(base, "rollout"), rel=0.01
    )
    best, everyone = (
        planner.plan(recipe(*more), 8, machine("h800")) for more in (["objective.best_of_n=4"], [])
    )
    # whole groups per rank
    assert seconds(best, "update") == pytest.approx(seconds(everyone, "update") / 3, rel=0.05)
    assert seconds(other("objective.kl_weight=0.1"), "update") == pytest.approx(
        1.25 * seconds(base, "update"), rel=0.05
    )
    window = other("rollout.window=2", "rollout.window_schedule=first")
    # states that a group shares
    assert 0.75 < seconds(window, "update") / (seconds(base, "update") * 2 / 15) < 1
    assert next(p for p in base.phases if p.name == "update").network > 0
    assert (
        next(
            p for p in planner.plan(recipe(), 8, machine("h800")).phases if p.name == "update"
        ).network
        == 0
    )


@pytest.mark.parametrize(
    "name", ["t2v_hunyuan", "i2v_skyreels", "t2i_flux", "t2i_hunyuan", "t2i_sd", "t2v_wan"]
)
def test_every_recipe_has_a_plan_and_says_what_was_assumed(name: str) -> None:
    found = planner.plan(recipe(name=name), 32, machine("h800"))
    assert found.fits
    assert [phase.name for phase in found.phases] == [
        "load",
        "rollout",
        "decode",
        "reward",
        "update",
        "save",
    ]
    assert any(
        "is not here: assumed the published network" in line for line in planner.warnings(found)
    )


def test_parameters_outside_the_blocks_are_warned_of() -> None:
    lines = planner.warnings(planner.plan(recipe(), 64, machine("h800")))
    assert any(
        line.startswith("360.7 M parameters (2.8%) lie outside") and "context_embedder" in line
        for line in lines
    )


def test_the_recipes_own_folder_is_read() -> None:
    found = subject(recipe(name="t2v_tiny"), 2, 8)
    assert found.job.latent == (8, 3, 8, 8)
    assert found.job.network.parameters == sum(
        p.numel() for p in tiny.load_policy().network.parameters()
    )
    assert not any("assumed the published" in line for line in found.notes)


def test_numbers_of_a_gpu_can_be_set() -> None:
    card, achieved = changed(gpu("H800"), Achieved(), {"update": 0.6, "network_gbs": 6.25})
    assert (card.network_gbs, achieved.update) == (6.25, 0.6)
    slow, quick = (planner.plan(recipe(), 64, Machine(card, of)) for of in (Achieved(), achieved))
    assert quick.seconds < slow.seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "64", "--gpu", "h900"], r"--gpu=h900: not in the table; use one of h800, h100"),
        (["--gpus", "12", "--gpu", "h800"], r"--gpus=12: not a multiple of the 8 of a node"),
        (
            ["distributed.shard=8", "distributed.sp=5", "--gpus", "40", "--gpu", "h800"],
            r"distributed.shard=8: must divide the 40 ranks",
        ),
        (
            ["distributed.sp=16", "--gpus", "16", "--gpu", "h800", "--ranks-per-node", "16"],
            r"distributed.sp=16: does not",
        ),
        (
            ["video.frames=50", "--gpus", "64", "--gpu", "h800"],
            r"video.frames=50: must be a multiple of 4, plus 1",
        ),
        (
            ["--gpus", "8", "--gpu", "h800", "--set", "speed=1"],
            r"--set=speed: no such number; use one of decode",
        ),
        (
            ["--gpus", "8", "--gpu", "h800", "--set", "update=1.5"],
            r"--set=update=1.5: must be a share from 0 to 1",
        ),
        (
            ["--gpus", "8", "--gpu", "h800", "--picture", "x.bmp"],
            r"--picture=x.bmp: no format of that name",
        ),
        (
            ["model.path=./nowhere", "--gpus", "8", "--gpu", "h800"],
            r"nowhere: has no transformer/config.json",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(T2V), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_the_command_prints_json_and_a_picture_and_exits_by_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.png"
    assert (
        cli.main(
            ["plan", str(T2V), "--gpus", "64", "--gpu", "h800", "--json", "--picture", str(file)]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["parameters"] == 12_821_012_544
    assert [row["gpus"] for row in told["curve"]] == [2**n for n in range(10)]
    assert [row["overrides"] for row in told["curve"]] == [[]] * 9 + [["distributed.sp=2"]]
    assert file.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", str(T2V), "--gpus", "8", "--gpu", "4090", "video.height=240"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "distributed.offload=true" in shown


def test_every_number_of_gpus_has_a_plan_or_the_reason_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """384 samples on 512 ranks share sequences; Stable Diffusion, which cannot, is refused."""
    assert cli.main(["plan", str(T2V), "--gpus", "64", "--gpu", "h800"]) == 0
    shown = capsys.readouterr().out
    assert "512, sp=2" in shown and "a run would refuse" not in shown
    sd = str(LAUNCH / "t2i_sd.toml")
    assert cli.main(["plan", sd, "--gpus", "8", "--gpu", "h800"]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "would refuse" in one)
    assert line.startswith("on 512 a run would refuse it: prompts.per_iteration=32: 384 samples")
    given = ["distributed.sp=2", "--gpus", "8", "--gpu", "h800"]
    assert cli.main(["plan", str(T2V), *given]) in (0, 1)
    assert "on 1 a run would refuse it: distributed.sp=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "found"),
    [("RTX 5090", "5090"), ("rtx_pro_6000", "rtx-pro-6000"), ("AMD-MI300X", "mi300x")],
)
def test_gpus_are_found_by_the_names_people_write(name: str, found: str) -> None:
    assert gpu(name).name == found


def test_a_plan_needs_neither_torch_nor_diffusers() -> None:
    """Importing them would take longer than the answer may."""
    script = (
        "import sys; from fastgrpo.cli import main as cli;"
        f"cli.main(['plan', {str(T2V)!r}, '--gpus', '64', '--gpu', 'h800', '--json']);"
        "sys.exit([m for m in ('torch', 'diffusers', 'matplotlib', 'numpy') if m in sys.modules] "
        "or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_room_is_what_the_reserve_leaves() -> None:
    assert machine("h800").usable() == pytest.approx((79.6 - 2.5) / 1.05 * GIB)
    with pytest.raises(UserError, match="no plan for it"):
        subject(recipe("model.family=cogvideo"), 8, 8)


def test_a_ring_over_nodes_leaves_each_node_once() -> None:
    """64 shards on 8 nodes: what a rank sends of the weights, an eighth of it through its own
    card.
    """
    found = job(HUNYUAN, recipe("distributed.shard=64"), 64, LATENT, 256)
    sent = compute.gather_whole(found)
    assert phases.route(found, sent) == (sent.gather, sent.gather / 8)
    inside = job(HUNYUAN, recipe("distributed.shard=8"), 64, LATENT, 256)
    assert phases.route(inside, compute.gather_whole(inside))[1] == 0


def test_kept_products_cost_bytes_and_no_flops() -> None:
    """Eight linear layers' widths of a single-stream block, nine of a dual-stream one's video."""
    asked = ("model.gradient_checkpointing=true", "model.keep=")
    kept, attended = (
        job(HUNYUAN, recipe(asked[0], asked[1] + keep), 64, LATENT, 256)
        for keep in ("products", "attention")
    )
    every = job(HUNYUAN, recipe("model.gradient_checkpointing=false"), 64, LATENT, 256)
    assert compute.update(kept, 1) == compute.update(every, 1)
    tokens, width = kept.video + kept.text, 3072
    single, dual = 8 * width * tokens, 9 * width * tokens
    # at the peak the last two of the 60 blocks are past or at work
    grown = sum(memory.update(kept, 1).values()) - sum(memory.update(attended, 1).values())
    assert grown == pytest.approx(2 * (38 * single + 20 * dual), rel=0.01)
    seconds = {
        keep: next(
            p
            for p in planner.plan(recipe(asked[0], asked[1] + keep), 64, machine("h800")).phases
            if p.name == "update"
        ).seconds
        for keep in ("products", "attention", "nothing")
    }
    assert seconds["products"] < seconds["attention"] < seconds["nothing"]
    assert memory.moved(attended, 1) == 0.0
    coefficients = 20 * (246.4 * kept.video + 130.4 * kept.text) + 40 * (
        242.4 * kept.video + 136.4 * kept.text
    )
    assert memory.moved(kept, 1) == pytest.approx(width * coefficients)


def test_replicas_share_the_writing_of_a_checkpoint() -> None:
    """All eight nodes write, whether each holds all states or an eighth of them."""

    def saving(*overrides: str) -> float:
        found = planner.plan(recipe(*overrides), 64, machine("h800"))
        return next(phase.seconds for phase in found.phases if phase.name == "save")

    hybrid, whole = saving("distributed.shard=8"), saving("distributed.shard=64")
    assert hybrid == pytest.approx(whole) == pytest.approx(12 * 12.82e9 / 2e9 / 8, rel=0.01)
    waiting = saving("distributed.shard=8", "checkpoint.background=true")
    assert waiting == pytest.approx(12 * 12.82e9 / 8 / 55e9, rel=0.01)


def test_states_that_change_ranks_are_sent() -> None:
    """Six of a prompt's twelve samples on a rank, three in each of four optimizer steps: one too
    many, 4.5 of 11, or two, 1 of 22; whole groups have their mean.
    """
    asked = job(HUNYUAN, recipe(), 64, LATENT, 256)
    expected = 4 * (0.5 * 9 / 22 + 1.5 * 1 / 11)
    assert network_calls.samples_moved(asked.recipe, 64) == pytest.approx(expected)
    assert network_calls.samples_moved(asked.recipe, 32) == 0.0
    # 22.3 expected of each rank in an optimizer step, and 23 micro-batches
    assert network_calls.waiting(asked.recipe, 64) == pytest.approx(1 - 22.3047 / 23, abs=1e-5)
    assert network_calls.waiting(asked.recipe, 32) < 0.021
    latents = 2 * 15 * 4 * math.prod(LATENT)
    assert compute.dealt_states(asked).dealt == pytest.approx(expected * latents)


def test_old_means_wait_where_guard_evaluates_again() -> None:
    def kept(*overrides: str) -> float:
        asked = ("rollout.batch_size=2", "optimizer.batch_size=1", "distributed.shard=8")
        found = planner.plan(recipe(*asked, *overrides), 64, machine("h800"))
        return next(p.memory["trajectories"] for p in found.phases if p.name == "update")

    states = 4 * 23  # of a rank; three of four optimizer steps are evaluated again
    more = 0.75 * states * 4 * math.prod(LATENT)
    assert kept("objective.kind=guard") - kept() == pytest.approx(more)
    assert kept("objective.kind=guard", "rollout.store=host") == 0.0


def test_kept_attention_costs_bytes_and_saves_flops() -> None:
    """A recomputed block keeps a number per token and channel, and a float32 per token and head."""
    kept = job(HUNYUAN, recipe("model.keep=attention"), 64, LATENT, 256)
    again = job(HUNYUAN, recipe("model.keep=nothing"), 64, LATENT, 256)
    once = compute.forward(kept, 1, kept.network.blocks)
    assert compute.update(again, 1).attention - compute.update(kept, 1).attention == once.attention
    assert compute.update(again, 1).products == compute.update(kept, 1).products
    tokens = kept.video + kept.text
    # at the peak two of the 60 blocks are past or at work, where all is counted
    bytes_kept = 58 * tokens * (2 * 24 * 128 + 4 * 24)
    grown = sum(memory.update(kept, 1).values()) - sum(memory.update(again, 1).values())
    assert grown == pytest.approx(bytes_kept)
