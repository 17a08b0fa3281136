"""rollout.batch_size = "auto": what fits, measured on this machine's memory, planned, and kept over
a resumption.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.policy import Condition
from fastgrpo.core.processes import OneRankError
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.workload import batch_size
from fastgrpo.tools.preflight import largest_batch
from fastgrpo.train import train
from tests import ROOT
from tests.harness import runs, tiny

MIB = 2**20


def test_what_fits_is_the_largest_that_does() -> None:
    for free, first, further in (
        (100.0, 10.0, 7.0),
        (100.0, 79.0, 2.0),
        (100.0, 80.0, 1.0),
        (10.0, 99.0, 1.0),
    ):
        fits = [
            size
            for size in range(1, 200)
            if first + (size - 1) * further <= batch_size.SHARE * free
        ]
        assert batch_size.fitting(free, first, further) == max(fits, default=1)
    assert batch_size.fitting(10.0, 9.0, 0.0) == 1 and batch_size.fitting(10.0, 7.0, 0.0) > 10**6


def test_batches_are_as_few_and_then_as_small_as_can_be() -> None:
    for samples in range(1, 50):
        for fit in range(1, samples + 3):
            size = batch_size.balanced(samples, fit)
            needed = -(-samples // fit)
            assert size <= fit and -(-samples // size) == needed
            assert size == 1 or -(-samples // (size - 1)) > needed


class Hungry:
    """A policy that takes 96 MiB for a forward, and 64 MiB more for each sample; its decoder 150
    MiB for each.
    """

    negative = None

    def __init__(self) -> None:
        self.network = torch.nn.Linear(4, 4)
        self.lengths: list[int] = []

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        assert len(x) == len(t) == len(condition["text"])
        self.lengths.append(condition["text"].shape[1])
        torch.ones((96 + 64 * len(x)) * MIB // 4, device=tiny.device())
        return x

    def decode(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        torch.ones(150 * len(x) * MIB // 4, device=tiny.device())
        return x


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str]]]:
    """What `rollout_batch` says of a Hungry policy for 17 samples, with 820 MiB free."""

    def asking(policy: Hungry, decode_batch: int | None, *sources: Any) -> tuple[int, str]:
        asked: Any = parts_of(policy, decode_batch, world, sources)
        return largest_batch.rollout_batch(asked)

    monkeypatch.setattr(
        "fastgrpo.tools.preflight.largest_batch.sharding.rollout_weights",
        lambda *_: nullcontext(True),
    )
    monkeypatch.setattr(
        "fastgrpo.tools.preflight.largest_batch.free_memory", lambda device: 820.0 * MIB
    )
    with open_world() as world:
        yield asking


class Judge:
    """A reward that takes 90 MiB for each of at most 3 clips."""

    shares_device, arriving, released = True, 0, 0

    def score(self, pixels: torch.Tensor, prompts: list[str], fps: float) -> None:
        assert pixels.shape == (3, 5, 16, 16, 3) and prompts == ["a"] * 3
        torch.ones(90 * len(pixels) * MIB // 4, device=tiny.device())

    def release(self) -> None:
        self.released += 1


def parts_of(
    policy: Hungry, decode_batch: int | None, world: World, sources: tuple[Any, ...] = ()
) -> SimpleNamespace:
    recipe = SimpleNamespace(
        video=SimpleNamespace(frames=5, height=16, width=16, fps=8.0),
        rewards=[SimpleNamespace(where="process", batch_size=3)],
        distributed=SimpleNamespace(offload=False),
        model=SimpleNamespace(decode_batch=decode_batch),
        objective=SimpleNamespace(kind="grpo"),
        rollout=SimpleNamespace(window=None, steps=5, samples_per_prompt=4),
        steps_trained=2,
    )
    grid, texts = torch.linspace(1, 0, 5), [torch.zeros(length, 4) for length in (3, 9, 5)]
    drawn = SimpleNamespace(
        latent_shape=(4, 2, 2, 2), grid=grid, store="device", expert=lambda step: 0
    )
    return SimpleNamespace(
        recipe=recipe,
        world=world,
        policy=policy,
        plan=drawn,
        scorer=SimpleNamespace(sources=sources, arriving=0),
        texts=["a", "b", "c"],
        conditions=[{"text": text} for text in texts],
        total=17,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(("decode_batch", "fit"), [(1, 8), (None, 4)])
def test_forwards_of_one_and_two_tell_what_fits(
    ask: Callable[..., tuple[int, str]], decode_batch: int | None, fit: int
) -> None:
    """820 MiB: (96 + 64 n) / 0.8 fit to n = 8.75 of the network, 150 n / 0.8 to n = 4.4 of the
    decoder.
    """
    policy = Hungry()
    size, told = ask(policy, decode_batch)
    assert set(policy.lengths) == {9}  # the longest text
    assert size == batch_size.balanced(17, fit), told  # three batches of 6, five of 4
    assert told.startswith(f"rollout.batch_size=auto: {size} of a rank's 17 samples at once (0.1")


def test_a_reward_in_the_process_has_its_memory_beside_the_rollout(
    ask: Callable[..., tuple[int, str]],
) -> None:
    """270 of the 820 MiB are the reward's: (96 + 64 n) / 0.8 fit to n = 5.4."""
    judge = Judge()
    size, told = ask(Hungry(), 1, judge)
    assert size == batch_size.balanced(17, 5) == 5 and judge.released == 1
    without, _ = ask(Hungry(), 1)
    assert without == 6 and "0.5 free" in told


class Full(Hungry):
    """Its forward has room for so many samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().velocity(x, t, condition)


def test_two_samples_are_not_tried_where_they_would_not_fit(
    ask: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # one takes 160
    monkeypatch.setattr(
        "fastgrpo.tools.preflight.largest_batch.free_memory", lambda device: 300.0 * MIB
    )
    assert ask(Full(1), 1)[0] == 1


def test_a_rank_without_room_says_so_itself(
    ask: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OneRankError):
        ask(Full(0), 1)
    line = capsys.readouterr().err
    assert line.startswith(
        "fastgrpo: rank 0: rollout.batch_size=auto: the GPU has no room for 1 of a rank's samples"
    )
    assert line.count("\n") == 1


def test_a_run_takes_what_fits_and_a_resumed_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    overrides = [*runs.SMALL, *runs.SMALLER, "rollout.batch_size=auto", f"run.dir={folder}"]
    monkeypatch.setattr("fastgrpo.tools.preflight.largest_batch.batch_size.fitting", lambda *_: 3)
    assert train(config.load(runs.RECIPE, [*overrides, "run.iterations=1"])) is not None
    assert "rollout.batch_size=auto: 3 of a rank's 8 samples at once" in capsys.readouterr().out
    assert (
        json.loads((folder / "checkpoints" / "step-1" / "progress.json").read_text())[
            "rollout_batch"
        ]
        == 3
    )
    monkeypatch.setattr("fastgrpo.tools.preflight.largest_batch.batch_size.fitting", lambda *_: 8)
    assert train(config.load(runs.RECIPE, overrides)) is not None
    assert "batch_size=auto" not in capsys.readouterr().out
    assert (
        json.loads((folder / "checkpoints" / "step-2" / "progress.json").read_text())[
            "rollout_batch"
        ]
        == 3
    )


def test_the_plan_takes_the_largest_that_fits() -> None:
    machine = Machine(gpu("h800"), Achieved())
    file = ROOT / "launch" / "t2v_hunyuan.toml"
    auto = planner.plan(config.load(file, ["rollout.batch_size=auto"]), 16, machine)
    chosen, samples = auto.subject.job.recipe.rollout.at_once, 24
    room_for = []
    for size in range(1, samples + 1):
        given = planner.plan(config.load(file, [f"rollout.batch_size={size}"]), 16, machine)
        phases = [phase for phase in given.phases if phase.name in ("rollout", "decode")]
        if all(p.peak + 0.25 * p.memory["activations"] <= machine.usable() for p in phases):
            room_for.append(size)
    assert room_for == list(range(1, max(room_for) + 1)) and chosen == batch_size.balanced(
        samples, max(room_for)
    )
    assert any(
        note.startswith(f"rollout.batch_size=auto comes to {chosen} of")
        for note in auto.subject.notes
    )
