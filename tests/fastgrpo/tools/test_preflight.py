"""Preflight names each planted fault on two ranks, is green without one, and leaves everything as
it was.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoConditionEmbedding

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward
from fastgrpo.models.hunyuan_video import HunyuanVideo
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.tools.preflight import iteration
from fastgrpo.tools.preflight import run as preflight_run
from fastgrpo.tools.preflight.iteration import short
from fastgrpo.tools.preflight.rewards import Tried, _judge, _try
from fastgrpo.tools.preflight.run import card_of
from fastgrpo.train import train
from fastgrpo.training.rollout import Plan
from tests.harness import forks, rounding, runs
from tests.harness.servers import TOKEN, running

pytestmark = pytest.mark.slow  # a real preflight for every planted fault

EVERYTHING = (
    "folder",
    "weights",
    "noise",
    "sequences",
    "reward tiny_world",
    "guidance",
    "log-probabilities",
    "ratio",
    "gradients",
    "decode",
    "scoring",
    "spread",
)


def told_by(which: str, folder: Path) -> list[dict[str, Any]]:
    """What two ranks were told, by rank."""
    done = forks.run(
        "tests.harness.workers.preflight",
        [str(folder / "run"), str(folder / "told"), which],
        2,
        600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (folder / "run").exists()
    return [json.loads((folder / f"told.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two replicas."""
    return told_by("replicas", tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks that share each sequence."""
    return told_by("shared", tmp_path_factory.mktemp("shared"))


def test_without_a_fault_one_line_says_so(
    told: list[dict[str, Any]], shared: list[dict[str, Any]]
) -> None:
    for rank in (*told, *shared):
        (line,) = rank["faults"]["nothing"]
        assert line.startswith("preflight: green in ")
        assert line.split(" s: ")[1] == ", ".join(EVERYTHING)


@pytest.mark.parametrize(
    ("fault", "red"),
    [
        ("a bf16 log-prob", "log-probabilities: off from float64 by "),
        ("a bf16 log-prob in the update", "ratio: max |log ratio| "),
        (
            "a seed that depends on the rank",
            "noise: rank 1 draws other noise than rank 0 for the same samples",
        ),
        (
            "a moved golden clip",
            "reward tiny_world: the golden clip's VQ is 0.988119 on rank 0, and was 0.978119 when",
        ),
        (
            "a moved golden clip on one rank",
            "reward tiny_world: the golden clip's VQ is 0.988119 on rank 1, and was 0.97",
        ),
        ("no room", "folder: 30.0 MiB free in "),
        ("replicas that do not reduce", "gradients: of "),
        ("another weight", "weights: "),
        (
            "a decoder that overflows",
            "decode: the VAE gives pixels that are not finite for 2 of 4 clips",
        ),
        ("a blank decoder", "decode: 4 of 4 clips are one colour"),
    ],
)
def test_each_fault_is_named_on_every_rank(
    told: list[dict[str, Any]], fault: str, red: str
) -> None:
    for rank in told:
        check_red(rank["faults"][fault], red)


@pytest.mark.parametrize(
    ("fault", "red"),
    [
        ("a broken sp gather", "sequences: relative difference from one rank's forward "),
        ("a seed that depends on the rank", "noise: rank 1 draws other noise"),
    ],
)
def test_faults_among_ranks_that_share_sequences(
    shared: list[dict[str, Any]], fault: str, red: str
) -> None:
    for rank in shared:
        check_red(rank["faults"][fault], red)


def check_red(lines: list[str], red: str) -> None:
    """The red line is there, and the error names its check and the way on."""
    assert any(line.startswith(f"preflight: red    {red}") for line in lines), lines
    check = red.partition(":")[0]
    named = lines[-1].removeprefix("run.preflight=true: red before training: ").partition(" (")[0]
    assert check in named.split(", ")
    assert lines[-1].endswith("run.preflight=false trains all the same.") and "\n" not in lines[-1]


def test_faults_that_touch_one_thing_are_red_in_one_line(told: list[dict[str, Any]]) -> None:
    for fault in (
        "no room",
        "replicas that do not reduce",
        "a moved golden clip",
        "a bf16 log-prob in the update",
    ):
        assert len(told[0]["faults"][fault]) == 2, told[0]["faults"][fault]


def test_the_whole_is_green_and_measures_every_phase(told: list[dict[str, Any]]) -> None:
    for rank in told:
        whole = rank["whole"]
        assert whole["green"] and all(line.startswith("green  ") for line in whole["lines"]), whole[
            "lines"
        ]
        checks = [line.removeprefix("green  ").partition(":")[0] for line in whole["lines"]]
        extra = ["ratio of other steps", "checkpoint", "folder, by that checkpoint"]
        assert checks == [*EVERYTHING, *extra]
        assert [phase["name"] for phase in whole["phases"]] == [
            "rollout",
            "decode",
            "reward",
            "update",
            "save",
        ]
        assert all(phase["seconds"] > 0 for phase in whole["phases"])
        assert whole["phases"][0]["times"] == 1  # 8 samples over 2 ranks, 4 at a time
        # 12 transitions of each rank over 2 optimizer steps, 8 at a time
        assert whole["phases"][3]["times"] == 2
    assert told[0]["whole"] == told[1]["whole"]


def test_a_checkpoint_that_is_not_read_back_is_red(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["a load that reads nothing"].startswith("red    checkpoint: ")
        assert "read back otherwise on rank 0" in rank["a load that reads nothing"]


def test_weights_state_random_numbers_and_files_are_as_they_were(
    told: list[dict[str, Any]], shared: list[dict[str, Any]]
) -> None:
    for rank in (*told, *shared):
        before, after = rank["state"]
        assert after == before


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H800", "h800"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", None),
    ],
)
def test_the_planners_gpu_is_found_by_the_devices_name(device: str, name: str | None) -> None:
    card = card_of(device)
    assert (card.name if card else None) == name


SMALL = [*runs.SMALL, "run.preflight=true", "prompts.limit=20", "rewards.0.where=process"]


def test_the_command_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["preflight", str(runs.RECIPE), *SMALL, f"run.dir={tmp_path / 'new' / 'run'}"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("green  ") == 15 and out.rstrip().endswith("preflight: all green")
    assert "seconds and peak memory" in out
    assert not list(tmp_path.iterdir())


def test_equal_rewards_are_yellow_and_end_no_run(tmp_path: Path) -> None:
    """The motion of images is 0."""
    image = ["video.frames=1", "run.preflight=true", "rollout.batch_size=4"]
    motion = "rewards=[{name='video_stats',where='process',weights={motion=1.0}}]"
    said = runs.succeed(tmp_path / "run", [*runs.SMALLER, *image, motion])
    told = (
        "preflight: yellow spread: the rewards of 0 of 1 prompts with several clips differ; equal"
    )
    assert told in said and "preflight: green in" in said
    assert "the run learned nothing" in said.replace("\n", " ")


def test_training_ends_before_its_first_evaluation_where_a_line_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    recipe = config.load(runs.RECIPE, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(
        UserError, match=r"run\.preflight=true: red before training: folder \(1\.0 MiB free in .*"
    ):
        train(recipe)
    assert "preflight: red    folder: 1.0 MiB free in " in capsys.readouterr().out
    assert not (tmp_path / "run" / "evaluation").exists() and not list(tmp_path.rglob("*.partial"))


def test_a_parameter_that_gets_no_gradient_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding of the time is taken as a constant: of its parameters, and of no others, none
    has a gradient.
    """
    forward = HunyuanVideoConditionEmbedding.forward

    def constant(*arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            return forward(*arguments, **named)

    recipe = config.load(runs.RECIPE, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    with mock.patch.object(HunyuanVideoConditionEmbedding, "forward", constant):
        assert not preflight_run.run(recipe)
    (red,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("red  ")]
    assert (
        red.startswith("red    gradients: none for time_text_embed.")
        and "models/hunyuan_video.py" in red
    )


def no_room_on_the_second(rank: int) -> None:
    def decode(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        HunyuanVideo.decode = decode  # type: ignore[method-assign, assignment]


def test_a_rank_whose_gpu_has_no_room_says_so_itself(tmp_path: Path) -> None:
    """The first rank waits for the second one's scores and cannot be told."""
    command, told = runs.arguments(tmp_path / "run", SMALL), tmp_path / "told"
    run = forks.start("fastgrpo.cli", command, ranks=2, errors=told, first=no_room_on_the_second)
    assert run.wait(runs.LIMIT) == 1
    line = "fastgrpo: rank 1: model.decode_batch=none: set it to 1: the GPU has no room for the decode."
    assert told.read_text().splitlines().count(line) == 1, told.read_text()


def plan(steps: int, window: range | None) -> Plan:
    return Plan(
        seed=0,
        iteration=0,
        group_size=4,
        grid=torch.linspace(1, 0, steps + 1),
        eta=0.3,
        shared_noise=True,
        latent_shape=(1, 1, 1, 1),
        window=window,
        trained=2,
    )


@pytest.mark.parametrize(
    ("steps", "window", "times", "noisy"),
    [
        (10, None, [1.0, 0.2, 0.1, 0.0], range(0, 2)),
        (10, range(3, 6), [1.0, 0.7, 0.5, 0.4, 0.0], range(1, 3)),
        (10, range(4, 5), [1.0, 0.6, 0.5, 0.0], range(1, 2)),
        (2, None, [1.0, 0.5, 0.0], range(0, 1)),
    ],
)
def test_the_short_plan_keeps_the_first_and_the_last_noisy_step(
    steps: int, window: range | None, times: list[float], noisy: range
) -> None:
    found = short(plan(steps, window))
    assert found.grid.tolist() == pytest.approx(times)
    assert found.noisy == noisy and found.chosen(0) == list(noisy)


@pytest.mark.parametrize(
    ("rank_1", "green", "told"),
    [
        (
            Tried(
                name="r",
                scores={"A": 0.5},
                again={"A": 0.5},
                expected={"A": 0.5},
                of="when it started",
            ),
            True,
            "A 0.5: twice the same, as when",
        ),
        (
            Tried(
                name="r", scores={"A": 0.5005}, again={"A": 0.5005}, expected={"A": 0.5}, of="then"
            ),
            True,
            "A 0.5",
        ),
        (
            Tried(name="r", scores={"A": 0.5}, again={"A": 0.5002}, expected=None),
            False,
            "A is 0.5 and at once again 0.5002, on rank 1",
        ),
        (
            Tried(name="r", scores={"A": 0.51}, again={"A": 0.51}, expected={"A": 0.5}, of="then"),
            False,
            "A is 0.51 on rank 1, and was 0.5 then",
        ),
        (
            Tried(name="r", scores={"A": 0.51}, again={"A": 0.51}, expected=None),
            False,
            "A is 0.51 on rank 1, and 0.5 on rank 0",
        ),
        (
            Tried(name="r", scores={"A": None}, again={"A": None}, expected=None),
            False,
            "A is none on rank 1, and 0.5 on rank 0",
        ),
        (
            Tried(name="r", scores={"A": 0.5}, again={"A": 0.5009}, expected=None, alone=False),
            True,
            "A 0.5: twice the same",
        ),
        (
            Tried(name="r", scores={"A": 0.5}, again={"A": 0.502}, expected=None, alone=False),
            False,
            "A is 0.5 and at once again 0.502, on rank 1",
        ),
    ],
)
def test_a_golden_clip_is_judged(rank_1: Tried, green: bool, told: str) -> None:
    rank_0 = Tried(
        name="r",
        scores={"A": 0.5},
        again={"A": 0.5},
        expected=rank_1.expected and {"A": 0.5},
        of=rank_1.of,
    )
    finding = _judge((rank_0, rank_1), 1e-3)
    assert finding.green == green and told in finding.measured


@pytest.mark.parametrize(("batch_sizes", "alone"), [((1,), True), ((8,), False), ((1, 1), False)])
def test_the_same_kernels_score_twice_where_one_server_takes_one_clip_at_a_time(
    batch_sizes: tuple[int, ...], alone: bool
) -> None:
    rewards: dict[str, Reward] = {"tiny_world": load(plain("tiny_world"))}
    with ExitStack() as stack:
        urls = [stack.enter_context(running(rewards, batch_size=size)) for size in batch_sizes]
        client = stack.enter_context(RewardClient(urls, TOKEN, ["tiny_world"]))
        client.wait_ready(30.0)
        (found,) = _try(client)
    assert found.alone == alone and found.scores == found.again


def test_the_same_kernels_score_twice_in_the_trainers_process() -> None:
    (found,) = _try(ScorerInProcess([plain("tiny_world")]))
    assert found.alone and found.scores == found.again


@pytest.mark.parametrize(
    ("dtype", "updates", "largest", "share", "green", "said"),
    [
        ("float32", 2, 2e-6, 0.0, True, "bound 2e-06 (float32)"),
        ("float32", 2, 3e-6, 0.0, False, "compute the same function"),
        ("bfloat16", 1, 1e-2, 1.0, True, "takes no old log-probability from the rollout"),
        ("bfloat16", 2, 1e-2, None, True, "takes no old log-probability from the rollout"),
        ("bfloat16", 2, 1e-2, 0.05, True, "; 5% outside the clip range 1e-04, bound 5%"),
        ("bfloat16", 2, 1e-2, 0.06, False, "equal batches of rollout and update round otherwise"),
        ("bfloat16", 1, 0.2, None, False, "compute the same function"),
        ("bfloat16", 2, float("nan"), 0.0, False, "compute the same function"),
    ],
)
def test_the_ratio_is_judged_by_what_would_be_clipped(
    dtype: str, updates: int, largest: float, share: float | None, green: bool, said: str
) -> None:
    settings = [f"model.dtype={dtype}", f"optimizer.updates_per_iteration={updates}"]
    recipe = config.load(runs.RECIPE, settings)
    metrics = {"update/max_log_ratio_first": largest, "update/transitions": 12.0}
    metrics |= {} if share is None else {"update/outside_first": share}
    parts: Any = SimpleNamespace(recipe=recipe, dtype=recipe.model.torch_dtype)
    done: Any = SimpleNamespace(metrics=metrics)
    finding = iteration.ratio(parts, done)
    assert finding.green == green and said in finding.line


def test_equal_batches_that_round_otherwise_end_a_run_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel that is another one where gradients are wanted would."""
    settings = [*runs.SMALLER, "model.dtype=bfloat16", "optimizer.updates_per_iteration=2"]
    settings += ["rollout.batch_size=1", "optimizer.batch_size=1", "rewards.0.where=process"]
    settings += ["objective.clip_range=1e-5", f"run.dir={tmp_path / 'run'}"]

    def linear(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return (rounding.linear if torch.is_grad_enabled() else rounding.PLAIN)(x, *others)

    monkeypatch.setitem(vars(torch.nn.functional), "linear", linear)
    with pytest.raises(UserError, match=r"red before training: ratio \(max .* outside the clip"):
        train(config.load(runs.RECIPE, settings))


def test_unequal_batches_are_green_in_bfloat16(tmp_path: Path) -> None:
    settings = [*runs.SMALLER, "model.dtype=bfloat16", "optimizer.updates_per_iteration=2"]
    settings += ["rollout.batch_size=2", "optimizer.batch_size=3", "rewards.0.where=process"]
    settings += ["run.iterations=1", f"run.dir={tmp_path / 'run'}"]
    with rounding.by_batch():
        train(config.load(runs.RECIPE, settings))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["update/max_log_ratio_first"] > 1e-6 and row["update/evaluated_again"] > 0
