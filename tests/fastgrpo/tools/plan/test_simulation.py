"""`fastgrpo plan --simulate` compares like with like."""

from pathlib import Path
from typing import Any

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.cli import plan as planning
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.tools.plan import phases, planner
from fastgrpo.tools.plan.costs import compute, memory
from fastgrpo.tools.plan.gpus import Achieved, changed, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.simulation import rank
from fastgrpo.tools.plan.simulation.rank import Ranks, Simulated, Sizes
from tests.fastgrpo.tools.plan.test_planner import HUNYUAN, T2V, job

SETTINGS = HUNYUAN | {
    "num_attention_heads": 4,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 256,
}
TINY = T2V.parent / "t2v_tiny.toml"


def recipe(*overrides: str, file: Path = T2V) -> Recipe:
    return config.load(file, overrides)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("whole", [True, False])
# where activations and where weights are most
@pytest.mark.parametrize("latent", [(16, 5, 60, 60), (16, 1, 16, 16)])
def test_a_rollouts_forward_has_its_weights_as_the_plan_says(
    latent: tuple[int, int, int, int], whole: bool
) -> None:
    """Peak memory within 5 %; bytes to the byte: block by block, or none behind the gather that
    comes before.
    """
    asked, text = recipe("distributed.sp=2", "rollout.batch_size=1"), 64
    passes = ("rollout memory", "rollout work")
    exact = rank.simulate(
        asked,
        config=SETTINGS,
        sizes=Sizes(latent, text),
        ranks=Ranks(4, 8, whole),
        passes=passes,
    )
    closed = job(SETTINGS, asked, 4, latent, text)
    assert exact.rollout_peak == pytest.approx(
        sum(memory.rollout(closed, 1, whole).values()), rel=0.05
    )
    tokens = compute.exchanged(closed, 1)
    expected = {"all-to-all": tokens.exchange, "gather of tokens": tokens.collect}
    assert exact.rollout_sent == expected | (
        {} if whole else {"all-gather": compute.gather_blocks(closed, 1).gather}
    )


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a simulation is asked for, in place of the minutes that it takes."""
    seen: dict[str, Any] = {}

    def simulate(recipe: object, config: object, sizes: object, ranks: Ranks) -> Simulated:
        seen["whole"] = ranks.whole
        return Simulated()

    monkeypatch.setattr(rank, "simulate", simulate)
    return seen


@pytest.mark.parametrize("gib", [30, 79])
def test_simulation_and_plan_choose_the_same_weights(asked_for: dict[str, Any], gib: int) -> None:
    """rollout_weights = "auto" on a small and on a large GPU."""
    found = planner.plan(
        recipe(), 64, Machine(*changed(gpu("h800"), Achieved(), {"memory_gib": gib}))
    )
    planning._simulate(found)
    assert asked_for["whole"] == phases.holds_whole(found.subject, found.machine) == (gib == 79)


def test_what_a_simulated_rank_lacks_is_left_out_of_the_plans_side(
    asked_for: dict[str, Any],
) -> None:
    """Average, initial policy and DiffusionNFT's raw weights: named, and the figures are those
    without them.
    """
    nft = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")
    copies = [
        (("optimizer.ema_decay=0.9", "objective.kl_weight=0.1"), ["average", "initial policy"]),
        (nft, ["average", "raw weights", "initial policy"]),
        ((), []),
    ]
    machine = Machine(gpu("h200"), Achieved())
    plain = planning._simulate(planner.plan(recipe(), 64, machine))["compared"]
    for overrides, left_out in copies:
        told = planning._simulate(planner.plan(recipe(*overrides), 64, machine))
        assert told["left_out"] == left_out
        assert told["compared"] == plain


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_command_says_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--gpus",
        "2",
        "--gpu",
        "h800",
        "--simulate",
        "--text-tokens",
        "16",
        "objective.kl_weight=0.1",
    ]
    assert (
        cli.main(["plan", str(TINY), *options, "rollout.batch_size=4", "optimizer.batch_size=4"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "both without average and initial policy, of which a simulated rank has none" in shown


def test_a_simulation_has_nowhere_to_offload_to(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "plan",
        str(T2V),
        "--gpus",
        "8",
        "--gpu",
        "h800",
        "--simulate",
        "distributed.offload=true",
    ]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "--simulate: " in error and "distributed.offload=false" in error
    )
