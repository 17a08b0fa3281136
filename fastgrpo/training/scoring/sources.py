"""The sources of scores: rewards in the trainer's process, and clients of reward servers."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import check_secret, read_secret
from fastgrpo.core.processes import local_world_size
from fastgrpo.core.reward import Scores
from fastgrpo.parallel.world import World
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.server.child import LOG, launch_beside

EVENTS = ("requests_failed", "requests_turned_away", "requests_bad", "clips_given_up")
"""The events that sources count; see rewards/serving/client/client.py."""


class NoScores(UserError):
    """Missing scores, which end the run on every rank between two updates.

    The weights can still be saved.
    """


class Source(Protocol):
    """A source of scores: the trainer's own process, or a reward server's client."""

    @property
    def at_once(self) -> int:
        """The number of batches that the source can score at a time, in as many threads."""

    @property
    def shares_device(self) -> bool:
        """Whether scoring takes memory of the trainer's own device."""

    @property
    def arriving(self) -> int:
        """Bytes of weights that scoring will bring to the trainer's GPU; 0 while they are there."""

    @property
    def hint(self) -> str:
        """Why clips have no score, or where that is told."""

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """Score a batch of clips.  pixels: uint8 [B, F, H, W, 3];  returns scores by reward"""

    def release(self) -> None:
        """Give back what only scoring needs, such as the memory of a shared GPU."""

    def take_events(self) -> dict[str, int]:
        """The numbers of EVENTS since the last call, by name."""


def open_rewards(recipe: Recipe, world: World, stack: ExitStack) -> list[Source]:
    """The sources of the rewards' scores, with a server beside the trainer where none is named."""
    for spec in recipe.rewards:
        check_frames(recipe, spec)
    inside = [spec for spec in recipe.rewards if spec.where == "process"]
    outside = [spec for spec in recipe.rewards if spec.where == "server"]
    sources: list[Source] = []
    parts: dict[str, Sequence[str]] = {}
    if inside:
        loaded = world.run_on_all_ranks(lambda: _load(inside, recipe, world))
        parts |= {name: served.reward.names for name, served in loaded.served.items()}
        sources.append(loaded)
    if outside:
        addresses = world.on_main(lambda: _servers(recipe, outside, world, stack))
        for (address, fps), names in _groups(outside, addresses).items():
            client = RewardClient(
                address.urls,
                token=address.token,
                names=names,
                timeout_s=recipe.server.request_timeout_s,
                outage_s=recipe.server.outage_s,
                fps=fps,
            )
            stack.callback(client.close)
            if address.log_file is not None:
                client.call_beside(address.log_file)
            parts |= _wait_ready(client, recipe.server.start_timeout_s, world)
            sources.append(client)
    for spec in recipe.rewards:
        check_scored(spec, parts[spec.name])
    return sources


def _load(specs: Sequence[RewardSpec], recipe: Recipe, world: World) -> ScorerInProcess:
    """The rewards in this process, tried out: what they raise is told before anything costly."""
    video = recipe.video
    loaded = ScorerInProcess(specs, world.device, recipe.server.outage_s)
    loaded.try_out(video.frames, (video.height, video.width), video.fps)
    return loaded


class Address(NamedTuple):
    """Where the servers of a reward are."""

    urls: tuple[str, ...]
    token: str
    log_file: Path | None = None  # of the server beside the trainer


def check_frames(recipe: Recipe, spec: RewardSpec) -> None:
    """Raise UserError where the recipe's clips are too short for a reward."""
    if recipe.video.frames < (least := rewards.least_frames(spec)):
        raise UserError(
            f"video.frames={recipe.video.frames}: {spec.name} judges clips of at least "
            f"{least}; use longer clips, or another reward."
        )


def check_parts(spec: RewardSpec, own: Sequence[str]) -> None:
    """Raise UserError for a weight or a threshold of a part that a reward does not have.

    own: the reward's parts without those that thresholds add
    """
    unknown = [part for part in spec.threshold if part not in own]
    if unknown:
        raise UserError(
            f"rewards.threshold.{unknown[0]}: {spec.name} has no part '{unknown[0]}'; its parts are "
            f"{', '.join(own)}."
        )
    check_scored(spec, [*own, *(f"{part}_above" for part in spec.threshold)])


def check_scored(spec: RewardSpec, parts: Sequence[str]) -> None:
    """Raise UserError for a weight of a part that is not scored.  parts: all that are scored"""
    unknown = [part for part in spec.weights if part not in parts]
    if unknown:
        raise UserError(
            f"rewards.weights: {spec.name} has no part '{unknown[0]}'; "
            f"its parts are {', '.join(parts)}."
        )


def _groups(
    specs: Sequence[RewardSpec], addresses: dict[str, Address]
) -> dict[tuple[Address, float | None], list[str]]:
    """The rewards of one request each: those with the same servers and the same frame rate."""
    groups: dict[tuple[Address, float | None], list[str]] = {}
    for spec in specs:
        groups.setdefault((addresses[spec.name], spec.fps), []).append(spec.name)
    return groups


def _wait_ready(client: RewardClient, timeout_s: float, world: World) -> dict[str, Sequence[str]]:
    """The parts of a client's rewards, once all its servers are ready and serve the same ones."""
    spec = world.on_main(lambda: client.wait_ready(timeout_s))
    client.expect(spec)
    return {name: spec[name]["parts"] for name in client.names}


def _servers(
    recipe: Recipe,
    specs: list[RewardSpec],
    world: World,
    stack: ExitStack,
) -> dict[str, Address]:
    """Each reward's addresses; one server, open as long as the stack, for those that name none."""
    settings = recipe.server
    addresses: dict[str, Address] = {}
    named = {spec.name: spec.urls or settings.urls for spec in specs}
    if any(named.values()):
        token = token_of(settings.token_file)
        addresses |= {name: Address(urls, token) for name, urls in named.items() if urls}
    beside = [spec for spec in specs if spec.name not in addresses]
    if not beside:
        return addresses
    if local_world_size(world.size) < world.size:
        raise UserError(
            "server.urls: none, and the run spans several nodes, which a server beside the first "
            "rank cannot serve; start servers with `fastgrpo serve-rewards` and name them."
        )
    for spec in beside:
        rewards.check(spec)
    url, token = stack.enter_context(
        launch_beside(beside, recipe.run.dir, settings.start_timeout_s, settings.outage_s),
    )
    here = Address((url,), token, recipe.run.dir / LOG)
    return addresses | {spec.name: here for spec in beside}


def token_of(file: Path | None, where: str = "server.token_file") -> str:
    """The bearer token for running servers: of a file, else of FASTGRPO_TOKEN.

    where: the key or option that names the file
    Raises UserError where there is none, or none that a header could carry.
    """
    if file is not None:
        return read_token(file, where)
    token = os.environ.get("FASTGRPO_TOKEN", "")
    if not token:
        raise UserError(
            f"{where}: missing; running servers want a token: name its file, or set FASTGRPO_TOKEN."
        )
    check_secret(token, "FASTGRPO_TOKEN")
    return token


def read_token(file: Path, where: str = "server.token_file") -> str:
    """The bearer token in a file. Raises UserError where a header cannot carry the content.

    where: the key or option that names the file
    """
    return read_secret(file, where, "the servers' bearer token")
