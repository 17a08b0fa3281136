"""Where scores come from: rewards in the trainer's process, and clients of reward servers."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Scores
from fastgrpo.parallel.world import World
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.server.child import launch_beside

EVENTS = ("requests_failed", "requests_turned_away", "requests_bad", "clips_given_up")
"""What sources count; see rewards/serving/client/client.py."""


class NoScores(UserError):
    """Scores that could not be had end the run, on every rank, between two updates: what was trained can be saved."""


class Source(Protocol):
    """Where scores come from: the trainer's own process or the reward server's client."""

    @property
    def at_once(self) -> int:
        """Batches that it can score at a time, in as many threads."""

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """pixels: uint8 [B, F, H, W, 3].  returns each reward's scores"""

    def release(self) -> None:
        """Give back what is not needed until the next scores are wanted, such as the memory of a shared GPU."""

    def take_events(self) -> dict[str, int]:
        """What went wrong since the last call: counts by the names of EVENTS."""


def open_rewards(recipe: Recipe, world: World, stack: ExitStack) -> list[Source]:
    """Where each reward's scores come from; starts the server beside the trainer where the recipe names none."""
    for spec in recipe.rewards:
        if recipe.video.frames < (least := rewards.least_frames(spec.name)):
            raise UserError(
                f"video.frames={recipe.video.frames}: {spec.name} judges clips of at least {least}; use longer clips, "
                "or another reward."
            )
    inside = [spec for spec in recipe.rewards if spec.where == "process"]
    outside = [spec for spec in recipe.rewards if spec.where == "server"]
    sources: list[Source] = []
    parts: dict[str, Sequence[str]] = {}
    if inside:
        here = world.run_on_all_ranks(lambda: ScorerInProcess(inside, world.device))
        parts |= {name: one.reward.names for name, one in here.served.items()}
        sources.append(here)
    if outside:
        addresses = world.on_main(lambda: _servers(recipe, outside, world, stack))
        for (urls, token, fps), names in _groups(outside, addresses).items():
            client, told = _connect(recipe, world, urls, token, fps, names, stack)
            parts |= told
            sources.append(client)
    for spec in recipe.rewards:
        unknown = [part for part in spec.weights if part not in parts[spec.name]]
        if unknown:
            raise UserError(
                f"rewards.weights: {spec.name} has no part '{unknown[0]}'; its parts are {', '.join(parts[spec.name])}."
            )
    return sources


Address = tuple[tuple[str, ...], str]  # urls, token


def _groups(
    specs: Sequence[RewardSpec], addresses: dict[str, Address]
) -> dict[tuple[tuple[str, ...], str, float | None], list[str]]:
    """The rewards that one request can ask for: of the same servers and told the same frame rate."""
    groups: dict[tuple[tuple[str, ...], str, float | None], list[str]] = {}
    for spec in specs:
        groups.setdefault((*addresses[spec.name], spec.fps), []).append(spec.name)
    return groups


def _connect(
    recipe: Recipe,
    world: World,
    urls: tuple[str, ...],
    token: str,
    fps: float | None,
    names: list[str],
    stack: ExitStack,
) -> tuple[RewardClient, dict[str, Sequence[str]]]:
    """(a client, the parts of its rewards), once all servers are ready and found to be the same."""
    settings = recipe.server
    client = RewardClient(urls, token, names, settings.request_timeout_s, settings.outage_s, fps)
    stack.callback(client.close)
    spec = world.on_main(lambda: client.wait_ready(settings.start_timeout_s))
    client.expect(spec)
    return client, {name: spec[name]["parts"] for name in names}


def _servers(recipe: Recipe, specs: list[RewardSpec], world: World, stack: ExitStack) -> dict[str, Address]:
    """Where each reward is served; starts one server, for as long as the stack is open, for those that name none."""
    settings = recipe.server
    addresses: dict[str, Address] = {}
    named = {spec.name: spec.urls or settings.urls for spec in specs}
    if any(named.values()):
        if settings.token_file is None:
            raise UserError("server.token_file: missing; running servers (urls) want a token, name its file.")
        token = read_token(settings.token_file)
        addresses |= {name: (urls, token) for name, urls in named.items() if urls}
    beside = [spec for spec in specs if spec.name not in addresses]
    if not beside:
        return addresses
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) < world.size:
        raise UserError(
            "server.urls: none, and the run spans several nodes, which a server beside the first rank cannot serve; "
            "start servers with `fastgrpo serve-rewards` and name them."
        )
    for spec in beside:
        rewards.check(spec.name)
    url, token = stack.enter_context(launch_beside(beside, recipe.run.dir, settings.start_timeout_s))
    return addresses | {spec.name: ((url,), token) for spec in beside}


def read_token(file: Path) -> str:
    """The bearer token in a file. Raises UserError where there is none that a header can carry."""
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise UserError(
            f"server.token_file={file}: {error.strerror}; write the servers' bearer token into it."
        ) from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"server.token_file={file}: no usable token in it; write one line of printable characters.")
    return token
