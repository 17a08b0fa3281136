"""Scores beside the rollout: overlap, failures of every kind, monitors, and what the metrics say of
them.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.advantages import combined_advantages
from fastgrpo.cli import main as cli
from fastgrpo.cli import options, serve
from fastgrpo.core import config
from fastgrpo.core.config import Objective, RewardSpec
from fastgrpo.core.errors import Exploded, UserError
from fastgrpo.core.policy import Decoded
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.parallel.world import World
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.run.failures import alarms
from fastgrpo.training.scoring.scorer import Scored, Scorer, reward_metrics, union_length
from fastgrpo.training.scoring.sources import Address, NoScores, _servers, open_rewards
from fastgrpo.training.scoring.validity import check_validity
from tests.harness import runs
from tests.harness.servers import TOKEN, running

GROUP, SAMPLES = 5, 20


class Brightness(Reward):
    """The first pixel of a clip, and its square; may fail at chosen calls or clips."""

    names = ("A", "B")

    def __init__(self, fault: str = "", pause_s: float = 0.0) -> None:
        self.fault = fault
        self.pause_s = pause_s
        self.spans: list[tuple[float, float]] = []

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        start = time.perf_counter()
        time.sleep(self.pause_s)
        first = pixels[:, 0, 0, 0, 0].float()
        hit = first % 5 == 2  # one clip in five
        values = {"A": first.clone(), "B": first.square()}
        valid = torch.ones(len(pixels), dtype=torch.bool)
        if self.fault == "nan":
            values["B"][hit] = float("nan")  # and says that it is valid
        elif self.fault == "raises" and hit.any():
            raise RuntimeError(prompts[0])
        elif self.fault == "late" and hit.any():
            time.sleep(0.7)
        elif self.fault == "too few" and hit.any():
            values = {part: column[:-1] for part, column in values.items()}
        elif self.fault == "monitor":
            values["A"][hit], valid[hit] = float("nan"), False
        self.spans.append((start, time.perf_counter()))
        return Scores(values, valid)


def specs(weight_b: float = 1.0, name: str = "x") -> list[RewardSpec]:
    return [RewardSpec(name=name, weights={"A": 1.0, "B": weight_b}, batch_size=1)]


def pixels() -> Tensor:
    """uint8 [20, 2, 4, 4, 3]; in each group of five one clip is the one that faults hit."""
    return (
        torch.arange(SAMPLES, dtype=torch.uint8)[:, None, None, None, None]
        .expand(SAMPLES, 2, 4, 4, 3)
        .contiguous()
    )


def submit(
    scorer: Scorer,
    size: int = 4,
    rollout_s: float = 0.0,
    latents: Tensor | None = None,
    finite: Tensor | None = None,
) -> list[tuple[float, float]]:
    """All samples in batches, with a pretended rollout before each.

    returns when the rollouts were
    """
    spans = []
    latents = torch.zeros(SAMPLES, 1, 1, 1, 1) if latents is None else latents
    finite = torch.ones(SAMPLES) > 0 if finite is None else finite
    for start in range(0, SAMPLES, size):
        began = time.perf_counter()
        time.sleep(rollout_s)
        spans.append((began, time.perf_counter()))
        slots = list(range(start, start + size))
        decoded = Decoded(pixels()[slots], finite[slots])
        scorer.submit(slots, latents[slots], decoded, [f"prompt {slot // GROUP}" for slot in slots])
    return spans


def scored_as(valid: Tensor) -> Scored:
    """Scores without parts, of finite samples.  valid: bool [N]"""
    finite = torch.ones_like(valid)
    return Scored(values={}, valid=valid, latents_finite=finite, pixels_finite=finite)


def in_process(
    monkeypatch: pytest.MonkeyPatch, reward: Brightness, specs: Sequence[RewardSpec]
) -> ScorerInProcess:
    monkeypatch.setattr(
        "fastgrpo.rewards.serving.in_process.load_served", lambda spec: Served(reward, spec)
    )
    return ScorerInProcess(specs)


def hit() -> Tensor:
    """bool [20]: the clips that faults hit."""
    return torch.arange(SAMPLES) % 5 == 2


def check_statistics(scored: Scored) -> None:
    """Advantages are those that the valid samples alone would have, in each group, by hand."""
    weights = {"A": 1.0, "B": 1.0}
    advantages = combined_advantages(
        scored.values, scored.valid, weights, GROUP, Objective(advantage_clip=100.0)
    )
    truth = {"A": torch.arange(SAMPLES).double(), "B": torch.arange(SAMPLES).double() ** 2}
    for start in range(0, SAMPLES, GROUP):
        members = [i for i in range(start, start + GROUP) if scored.valid[i]]
        expected = sum((r[members] - r[members].mean()) / r[members].std() for r in truth.values())
        assert torch.allclose(advantages[members].double(), torch.as_tensor(expected), atol=1e-5)
    assert (advantages[~scored.valid] == 0).all()


@pytest.mark.parametrize("fault", ["nan", "raises", "late", "too few"])
@pytest.mark.parametrize("where", ["process", "server"])
def test_one_clip_in_five_fails_and_the_others_are_as_if_it_were_not_there(
    fault: str, where: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Brightness(fault)
    with ExitStack() as stack:
        if where == "server":
            url = stack.enter_context(running({"x": reward}, batch_size=1, wait_s=0.0))
            source: Any = stack.enter_context(
                RewardClient([url], TOKEN, ["x"], timeout_s=0.4, outage_s=30.0)
            )
            source.at_once = 1  # so that a late clip makes no other one late
            source.wait_ready(5.0)
        else:
            source = in_process(monkeypatch, reward, specs())
        scorer = Scorer([source], specs(), 8.0, world)
        stack.callback(scorer.close)
        if fault == "late" and where == "server":
            submit(scorer, 1)
        else:
            submit(scorer)
        scored = scorer.collect(SAMPLES)
    # nobody waits in vain there: late is only slow
    in_time = fault == "late" and where == "process"
    assert torch.equal(~scored.valid, hit() & (not in_time))
    check_statistics(scored)
    metrics = scored.metrics()
    lost = 0 if in_time else 4
    assert (metrics["invalid/A"], metrics["invalid/B"]) == (0 if fault == "nan" else lost, lost)
    if fault == "late" and where == "server":
        assert metrics["scoring/requests_bad"] >= 8 and metrics["scoring/clips_given_up"] == 4
    recipe: Any = SimpleNamespace(weights={"A": 1.0, "B": 1.0})
    logged = reward_metrics(scored, recipe.weights, GROUP)
    assert logged["reward/invalid"] == lost and logged[alarms.MONITORS] == 0
    assert logged["reward/A"] == pytest.approx(
        torch.arange(SAMPLES)[scored.valid].float().mean().item()
    )


def test_latents_and_pixels_that_are_not_finite_have_no_score(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.zeros(SAMPLES, 1, 1, 1, 1)
    latents[7], latents[8] = float("nan"), float("inf")
    finite = torch.ones(SAMPLES) > 0
    finite[[8, 11]] = False  # as the VAE decoded them
    scorer = Scorer([in_process(monkeypatch, Brightness(), specs())], specs(), 8.0, world)
    submit(scorer, latents=latents, finite=finite)
    scored = scorer.collect(SAMPLES)
    scorer.close()
    assert (~scored.valid).nonzero().flatten().tolist() == [7, 8, 11]
    assert (~scored.latents_finite).nonzero().flatten().tolist() == [7, 8]
    assert scored.metrics()["not_finite/latents"] == 2 and scored.metrics()["invalid/A"] == 3
    assert scored.metrics()["not_finite/pixels"] == 1, "which are not those of such latents"


def test_a_monitor_without_a_score_costs_no_sample(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, monitor = Brightness(), Brightness("monitor")
    several = [
        RewardSpec(name="main", weights={"A": 1.0}),
        RewardSpec(name="monitor", weights={"M": 0.0}),
    ]

    class Renamed(Reward):
        names = ("M",)

        def __call__(self, *arguments: Any) -> Scores:
            scores = monitor(*arguments)
            return Scores({"M": scores.values["A"]}, scores.valid)

    rewards: dict[str, Any] = {"main": main, "monitor": Renamed()}
    monkeypatch.setattr(
        "fastgrpo.rewards.serving.in_process.load_served",
        lambda spec: Served(rewards[spec.name], spec),
    )
    scorer = Scorer([ScorerInProcess(several)], several, 8.0, world)
    submit(scorer)
    scored = scorer.collect(SAMPLES)
    scorer.close()
    assert scored.valid.all() and scored.values["M"].isnan().tolist() == hit().tolist()
    assert scored.weighted_sum({"A": 1.0, "M": 0.0}).tolist() == list(range(SAMPLES))
    recipe: Any = SimpleNamespace(weights={"A": 1.0, "M": 0.0})
    metrics = reward_metrics(scored, recipe.weights, GROUP)
    assert metrics["reward/invalid"] == 0 and metrics["invalid/M"] == 4
    assert metrics["reward/M"] == pytest.approx(torch.arange(SAMPLES)[~hit()].float().mean().item())


@pytest.mark.parametrize("where", ["process", "server"])
def test_nan_in_a_part_of_weight_0_costs_no_sample(
    where: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, weights = Brightness("nan"), {"A": 1.0, "B": 0.0}
    with ExitStack() as stack:
        source: Any
        if where == "server":
            url = stack.enter_context(running({"x": reward}, batch_size=1, wait_s=0.0))
            source = stack.enter_context(RewardClient([url], TOKEN, ["x"], outage_s=30.0))
            source.wait_ready(5.0)
        else:
            source = in_process(monkeypatch, reward, specs(0.0))
        scorer = Scorer([source], specs(0.0), 8.0, world)
        stack.callback(scorer.close)
        submit(scorer)
        scored = scorer.collect(SAMPLES)
    assert scored.valid.all() and scored.values["A"].tolist() == list(range(SAMPLES))
    assert scored.values["B"].isnan().tolist() == hit().tolist()
    logged = reward_metrics(scored, weights, GROUP)
    assert logged["reward/invalid"] == 0 and logged[alarms.MONITORS] == logged["invalid/B"] == 4
    assert (
        alarms.counted(logged | {alarms.EMPTY: 0.0, alarms.GROUPS: 0.0})["monitors_without_score"]
        == 4
    )


# ---- overlap


def test_scoring_runs_beside_the_rollout_and_changes_no_score(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Brightness(pause_s=0.0)
    source = in_process(monkeypatch, reward, specs())
    one_by_one = []
    for slot in range(SAMPLES):
        one_by_one.append(source.score(pixels()[slot : slot + 1], ["p"], 8.0)["x"].values["B"])
    reward.pause_s, reward.spans = 0.02, []
    scorer = Scorer([source], specs(), 8.0, world)
    rollouts = submit(scorer, 2, rollout_s=0.12)
    scored = scorer.collect(SAMPLES)
    scorer.close()
    assert torch.equal(scored.values["B"], torch.cat(one_by_one))
    # while a batch is drawn, clips of an earlier one are scored
    for number, rollout in enumerate(rollouts[1:]):
        assert any(start < rollout[1] and end > rollout[0] for start, end in reward.spans), number
    assert scored.seconds >= SAMPLES * 0.02 and 0.0 < scored.waited < scored.seconds
    # 0.9 where nothing else runs: the last of ten batches alone is waited for
    assert scored.hidden_share > 0.5


def test_several_batches_are_scored_at_a_time_where_the_source_allows() -> None:
    spans = [(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.5)]
    assert union_length(spans) == 3.0 and union_length([]) == 0.0
    nothing = scored_as(torch.ones(0) > 0)
    assert replace(nothing, seconds=4.0, waited=1.0).hidden_share == 0.75
    assert nothing.hidden_share == 1.0


class Pool:
    """A source that says who is inside."""

    shares_device, arriving, hint = False, 0, ""

    def __init__(self, at_once: int, failure: Exception | None = None) -> None:
        self.at_once = at_once
        self.failure = failure
        self.inside, self.most, self.released = 0, 0, 0
        self.lock = threading.Lock()

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.03)
        with self.lock:
            self.inside -= 1
        if self.failure is not None:
            raise self.failure
        return {
            "x": Scores(
                {"A": torch.ones(len(pixels)), "B": torch.ones(len(pixels))},
                torch.ones(len(pixels)) > 0,
            )
        }

    def release(self) -> None:
        self.released += 1

    def take_events(self) -> dict[str, int]:
        return {"requests_failed": 2}


def test_each_source_has_its_own_threads_and_is_released_at_the_end(world: World) -> None:
    one, four = Pool(1), Pool(4)
    scorer = Scorer([one, four], specs(), 8.0, world)
    submit(scorer, 2)
    scored = scorer.collect(SAMPLES)
    scorer.close()
    assert one.most == 1 and 2 <= four.most <= 4
    assert one.released == four.released == 1
    assert (
        scored.events["requests_failed"] == 4 and scored.metrics()["scoring/requests_failed"] == 4.0
    )


def test_a_source_that_fails_ends_the_iteration_with_its_line(world: World) -> None:
    for failure, said in (
        (UserError("server.urls=u: no scores for 3 s"), "server.urls=u: no scores for 3 s"),
        (KeyError("x"), "rewards: scoring raised KeyError"),
    ):
        scorer = Scorer([Pool(1, failure)], specs(), 8.0, world)
        submit(scorer, 2)
        with pytest.raises(UserError, match=said):
            scorer.collect(SAMPLES)


# ---- where scores come from


def recipe(tmp_path: Path, *rewards: dict[str, object], **server: object) -> config.Recipe:
    listed = ", ".join(
        "{" + ", ".join(f"{k} = {v}" for k, v in reward.items()) + "}" for reward in rewards
    )
    overrides = [f"rewards=[{listed}]", *(f"server.{key}={value}" for key, value in server.items())]
    return config.load(runs.RECIPE, [f"run.dir={tmp_path}", *overrides])


def test_rewards_of_several_servers_and_rates_become_sources_of_their_own(
    world: World, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with (
        running({"a": Brightness(), "b": Brightness()}) as first,
        running({"c": Brightness()}) as second,
        ExitStack() as stack,
    ):
        settings = recipe(
            tmp_path,
            {"name": "'a'", "weights": "{A = 1.0}"},
            {"name": "'b'", "weights": "{B = 1.0}", "fps": 3.0},
            {"name": "'c'", "weights": "{}", "urls": f"['{second}']"},
            urls=f"['{first}']",
            token_file=token,
        )
        sources = open_rewards(settings, world, stack)
        found = [
            (s.names, s.fps, s.replicas.all[0].url) for s in sources if isinstance(s, RewardClient)
        ]
        assert found == [(("a",), None, first), (("b",), 3.0, first), (("c",), None, second)]
        with pytest.raises(
            UserError, match=r"rewards\.weights: a has no part 'Z'; its parts are A, B"
        ):
            wrong = recipe(
                tmp_path,
                {"name": "'a'", "weights": "{Z = 1.0}"},
                urls=f"['{first}']",
                token_file=token,
            )
            open_rewards(wrong, world, stack)


def test_urls_of_a_reward_want_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGRPO_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"server\.token_file: missing"):
        recipe(tmp_path, {"name": "'a'", "weights": "{A = 1.0}", "urls": "['http://127.0.0.1:1']"})


def test_the_token_of_running_servers_may_come_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGRPO_TOKEN", "made-up-for-a-test")
    asked = recipe(
        tmp_path, {"name": "'a'", "weights": "{A = 1.0}", "urls": "['http://127.0.0.1:1']"}
    )
    world = cast(World, SimpleNamespace(size=1))
    with ExitStack() as stack:
        addresses = _servers(asked, list(asked.rewards), world, stack)
    assert addresses == {"a": Address(("http://127.0.0.1:1",), "made-up-for-a-test")}
    monkeypatch.setenv("FASTGRPO_TOKEN", "two\nlines")
    with pytest.raises(UserError, match="FASTGRPO_TOKEN: no usable token"):
        _servers(asked, list(asked.rewards), world, ExitStack())


def test_serve_rewards_takes_its_rewards_from_a_recipe() -> None:
    def asked(*arguments: str) -> list[RewardSpec]:
        words = cli.parser().parse_args(["serve-rewards", *arguments])
        options.with_paths(words)
        return serve.served_specs(words)

    assert asked("tiny_world") == [plain("tiny_world")]
    first = "{name='tiny_world', weights={VQ=1.0}, batch_size=3}"
    several = f"rewards=[{first}, {{name='b', weights={{B=0.0}}, where='process'}}]"
    (found,) = asked("--recipe", str(runs.RECIPE), several)
    assert (found.name, found.batch_size) == ("tiny_world", 3)
    for arguments, said in (
        ([], "nothing to serve"),
        (["--only", "a", "tiny_world"], "nothing to serve"),
        (
            ["--recipe", str(runs.RECIPE), several, "--only", "b"],
            "--only=b: .* has no such reward with where='server', only tiny_world",
        ),
        (
            ["--recipe", str(runs.RECIPE), "rewards.0.where=process"],
            "with where='server'; it has none. Add",
        ),
    ):
        with pytest.raises(UserError, match=said):
            asked(*arguments)


# ---- a whole run


class Faulty(Reward):
    """The tiny world's reward, which fails at every fifth clip, each time in another way."""

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.inner = load(plain("tiny_world"))
        self.names = self.inner.names
        self.clips = 0

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.clips += 1
        scores = self.inner(pixels, prompts, fps)
        match self.clips % 20:
            case 4:
                scores.values["VQ"][:] = float("nan")
            case 9:
                raise OSError("of this clip")
            case 14:
                return Scores(
                    {part: values[:0] for part, values in scores.values.items()}, scores.valid[:0]
                )
            case 19:
                scores.valid[:] = False
        return scores


def test_a_run_goes_on_without_the_samples_that_have_no_score(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with running({"tiny_world": Faulty()}, max_body=2**28, batch_size=1) as url:
        server = [f"server.urls=['{url}']", f"server.token_file={token}"]
        runs.succeed(tmp_path / "run", [*server, "run.iterations=2", "server.max_invalid=0.4"])
    rows = runs.metrics(tmp_path / "run")
    # of 8, in steps of five
    assert len(rows) == 2 and all(1 <= row["reward/invalid"] <= 3 for row in rows)
    assert all(row["reward/invalid"] == row["invalid/VQ"] for row in rows)
    assert all(
        row["update/grad_norm"] > 0 and 0.0 <= row["scoring/hidden_share"] <= 1.0 for row in rows
    )


def test_too_many_samples_without_a_score_end_the_run() -> None:
    settings = config.load(runs.RECIPE, ["server.max_invalid=0.2"])
    check_validity(settings, scored_as(torch.arange(10) >= 2), 7, "")
    with pytest.raises(
        UserError,
        match=r"server\.max_invalid=0\.2: 30% of the samples of iteration 8 have no valid score "
        r"\(see x\.log\)",
    ):
        check_validity(settings, scored_as(torch.arange(10) >= 3), 7, "see x.log")


def test_samples_that_are_not_finite_are_named_as_what_they_are() -> None:
    settings = config.load(runs.RECIPE, ["server.max_invalid=0.2", "optimizer.lr=7.0"])
    some = torch.arange(10) >= 3
    lost = replace(scored_as(some), latents_finite=some, pixels_finite=some)
    with pytest.raises(
        Exploded, match=r"optimizer\.lr=7: the weights have exploded: the latents of"
    ):
        check_validity(settings, lost, 7, "")
    with pytest.raises(Exploded, match=r"the pixels of 30% of the samples of iteration 8"):
        check_validity(settings, replace(lost, latents_finite=torch.ones(10) > 0), 7, "")
    with pytest.raises(NoScores, match=r"model\.dtype=float32: before any training the latents"):
        check_validity(settings, lost, 0, "")


@pytest.mark.parametrize("where", ["process", "server"])
def test_a_reward_for_longer_clips_is_refused_before_it_is_loaded(where: str, world: World) -> None:
    """VideoAlign on images: neither its weights nor a server are looked for."""
    recipe = config.load(
        runs.RECIPE, ["video.frames=1", "rewards.0.name=videoalign", f"rewards.0.where={where}"]
    )
    told = "video.frames=1: videoalign judges clips of at least 2; use longer clips, or another reward."
    with ExitStack() as stack, pytest.raises(UserError, match=f"^{told}$"):
        open_rewards(recipe, world, stack)
