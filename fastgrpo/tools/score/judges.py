"""Rewards as a command line asks for them, in this process or behind running servers; they say why a clip has no score.

In this process they score exactly as the trainer's do; what the trainer only logs by class and place is told in full.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, RewardWrapper, Scores
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.training.scoring.sources import Source, read_token

SETTINGS = [key for key in RewardSpec.model_fields if key not in ("name", "weights", "where", "urls", "options")]
START_TIMEOUT_S, OUTAGE_S = 30.0, 60.0  # a person waits at the terminal


@dataclass(frozen=True)
class Asked:
    """Which rewards, and with what settings, as the command line says it."""

    names: tuple[str, ...] = ()  # with a file: of its rewards, none = all
    file: Path | None = None  # a recipe, or a file of [[rewards]] alone
    paths: tuple[str, ...] = ()  # [NAME=]PATH
    options: tuple[str, ...] = ()  # [NAME.]key=value
    settings: tuple[str, ...] = ()  # the same, of the spec's other keys


@dataclass(frozen=True)
class Servers:
    """Running reward servers; no urls = the rewards are loaded here."""

    urls: tuple[str, ...] = ()
    token_file: Path | None = None  # none = the environment variable FASTGRPO_TOKEN


@dataclass(frozen=True)
class Verdict:
    """What a reward says of one clip."""

    scores: dict[str, float]  # part -> score, NaN in every part where there is none
    kind: str | None = None  # why there is none: the class of what was raised, or "no score", "not finite", "server"
    reason: str = ""  # the same in words


def specs(asked: Asked) -> list[RewardSpec]:
    """The rewards with their settings. Raises UserError for one that does not exist, or a setting that is none."""
    trees = {name: spec.model_dump() for name, spec in _chosen(asked).items()}
    for text in asked.paths:
        name, equals, path = text.partition("=")
        if not (equals and name in trees):
            name, path = _only(trees, f"--path={text}", "NAME=PATH"), text
        trees[name]["path"] = path
    for text in asked.options:
        _assign(trees, "--option", text, ("options",))
    for text in asked.settings:
        _assign(trees, "--set", text, ())
    return [config.section(RewardSpec, "rewards", tree) for tree in trees.values()]


def _chosen(asked: Asked) -> dict[str, RewardSpec]:
    """The rewards by name, before the command line's settings."""
    doubled = [name for name in asked.names if asked.names.count(name) > 1]
    if doubled:
        raise UserError(f"--reward={doubled[0]}: is named twice; name it once.")
    if asked.file is None:
        if not asked.names:
            raise UserError(f"--reward: missing; name one of {', '.join(rewards.known())}, or give --recipe FILE.")
        for name in asked.names:
            rewards.check(name)
        return {name: rewards.plain(name) for name in asked.names}
    found = read(asked.file)
    for name in asked.names:
        if name not in found:
            raise UserError(f"--reward={name}: {asked.file} has no such reward; it has {', '.join(found)}.")
    return {name: found[name] for name in asked.names or found}


def read(file: Path) -> dict[str, RewardSpec]:
    """The rewards of a recipe, or of a file that has [[rewards]] alone, where `weights` may be left out; by name."""
    tree = config.read_tree(file)
    entries = tree.get("rewards")
    if set(tree) == {"rewards"} and isinstance(entries, list) and all(isinstance(one, dict) for one in entries):
        found = [config.section(RewardSpec, "rewards", {"weights": {}} | entry) for entry in entries]
    else:
        found = list(config.parse(tree).rewards)
    by_name = {spec.name: spec for spec in found}
    if len(by_name) < len(found):
        raise UserError(f"rewards: {file} names a reward twice; leave one of them out.")
    return by_name


def _assign(trees: Mapping[str, dict[str, Any]], option: str, text: str, below: tuple[str, ...]) -> None:
    """Set `[NAME.]key=value` in the reward's tree, in place."""
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{option}={text}: not of the form key=value or NAME.key=value.")
    named = keys[0] in trees and len(keys) > 1
    node = trees[keys.pop(0) if named else _only(trees, f"{option}={text}", "NAME.key=value")]
    if not below and keys[0] not in SETTINGS:
        near = difflib.get_close_matches(keys[0], SETTINGS, n=1, cutoff=0.0)[0]
        raise UserError(f"{option}={text}: a reward has no such key; did you mean '{near}'?")
    for step in (*below, *keys[:-1]):
        node = node.setdefault(step, {})
        if not isinstance(node, dict):
            raise UserError(f"{option}={text}: '{step}' has no keys below it.")
    node[keys[-1]] = config.read_value(value)


def _only(trees: Mapping[str, object], told: str, form: str) -> str:
    """The one reward that is meant where none is named."""
    if len(trees) > 1:
        raise UserError(f"{told}: of which reward ({', '.join(trees)})? Write it as {form}.")
    return next(iter(trees))


class RecordingReward(RewardWrapper):
    """A reward that records why it gave no score. All else is the reward's own."""

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)
        self.trouble: tuple[str, str] | None = None  # of the last call: its class and what was said

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """The reward's scores; what it raises is noted and goes on."""
        self.trouble = ("malformed", "it did not give one score per part and clip")
        try:
            scores = self.reward(pixels, prompts, fps)
        except Exception as error:  # anyone's code, as in rewards.judge_batch, which deals with it
            lines = str(error).strip().splitlines()
            self.trouble = (type(error).__name__, lines[0] if lines else "no message")
            raise
        odd = {part: float(v.flatten()[0]) for part, v in scores.values.items() if not torch.isfinite(v).all()}
        if not scores.valid.all():
            self.trouble = ("no score", "the reward gives none for this clip")
        elif odd:
            self.trouble = ("not finite", ", ".join(f"{part}={value}" for part, value in odd.items()))
        return scores


@dataclass
class Judges:
    """Open rewards. A clip's verdicts depend on that clip, its prompt and its frame rate alone."""

    sources: Sequence[Source]
    parts: dict[str, tuple[str, ...]]  # reward -> all that it scores
    recorders: dict[str, RecordingReward] = field(default_factory=dict)  # of the rewards in this process

    @property
    def read_prompts(self) -> bool:
        """Whether any of them looks at prompts; of one behind a server nobody knows, so it does."""
        return any(name not in self.recorders or self.recorders[name].reads_prompts for name in self.parts)

    def score(self, clip: Tensor, prompt: str, fps: float) -> dict[str, Verdict]:
        """Each reward's verdict on one clip, uint8 [F, H, W, 3].

        Raises UserError where a server is gone or refuses the clip.
        """
        verdicts = {}
        with _overheard(bool(self.recorders)) as said:
            for source in self.sources:
                for name, scores in source.score(clip[None], [prompt], fps).items():
                    verdicts[name] = self._verdict(name, scores, said)
        return {name: verdicts[name] for name in self.parts}

    def _verdict(self, name: str, scores: Scores, said: Mapping[str, str]) -> Verdict:
        values = {part: float(scores.values[part][0]) for part in self.parts[name]}
        if bool(scores.valid[0]):
            return Verdict(values)
        if name not in self.recorders:
            return Verdict(values, "server", "the server gives no score; its log says why")
        kind, reason = self.recorders[name].trouble or ("malformed", "it did not give one score per part and clip")
        if kind == "no score":
            reason = said.get(type(self.recorders[name].reward).__module__, reason)
        return Verdict(values, kind, reason)


class _Ear(logging.Handler):
    """Keeps the last line that each module logs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said[record.name] = record.getMessage()


@contextmanager
def _overheard(listen: bool) -> Iterator[Mapping[str, str]]:
    """What the rewards log, by module, instead of on the terminal: the table tells it."""
    ear, logger = _Ear(), logging.getLogger(rewards.__name__)
    if not listen:
        yield ear.said
        return
    logger.addHandler(ear)
    before, logger.propagate = logger.propagate, False
    try:
        yield ear.said
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


@contextmanager
def opened(specs: Sequence[RewardSpec], servers: Servers, device: torch.device | None = None) -> Iterator[Judges]:
    """Load the rewards, or reach the servers that have them; with servers only names and frame rates count.

    device: what the rewards with device="auto" may share; none = the CPU
    Raises UserError for a wrong setting, token or address, and for a server without the reward.
    """
    if servers.urls:
        with ExitStack() as stack:
            yield _behind(specs, servers, stack)
        return
    inside = ScorerInProcess(specs, device)
    recorders = {}
    for name, served in inside.served.items():
        served.reward = recorders[name] = RecordingReward(served.reward)
    yield Judges([inside], {name: tuple(one.reward.names) for name, one in inside.served.items()}, recorders)


def _behind(specs: Sequence[RewardSpec], servers: Servers, stack: ExitStack) -> Judges:
    """Clients of the servers, one for each frame rate that rewards are told."""
    token = _token(servers.token_file)
    groups: dict[float | None, list[str]] = {}
    for spec in specs:
        groups.setdefault(spec.fps, []).append(spec.name)
    sources: list[Source] = []
    parts: dict[str, tuple[str, ...]] = {}
    for fps, names in groups.items():
        client = stack.enter_context(RewardClient(servers.urls, token, names, outage_s=OUTAGE_S, fps=fps))
        told = client.wait_ready(START_TIMEOUT_S)
        parts |= {name: tuple(told[name]["parts"]) for name in names}
        sources.append(client)
    return Judges(sources, {spec.name: parts[spec.name] for spec in specs})


def _token(file: Path | None) -> str:
    """The bearer token of the servers."""
    if file is not None:
        return read_token(file)
    token = os.environ.get("FASTGRPO_TOKEN", "")
    if not token:
        raise UserError("--token-file: missing; running servers want a token: name its file, or set FASTGRPO_TOKEN.")
    return token
