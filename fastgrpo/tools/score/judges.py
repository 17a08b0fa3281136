"""The rewards of a command line, in this process or behind running servers.

In this process they score exactly as the trainer's rewards do. A clip without a score has the full
reason, of which the trainer logs only the class and position.
"""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec, paths
from fastgrpo.core.config.overrides import with_paths
from fastgrpo.core.errors import UserError, described
from fastgrpo.core.reward import Reward, RewardWrapper, Scores
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.training.scoring.sources import Source, token_of

OTHER_KEYS = ("name", "weights", "where", "urls", "options")  # not to be set by --set
SETTINGS = [key for key in RewardSpec.model_fields if key not in OTHER_KEYS]
START_TIMEOUT_S, OUTAGE_S = 30.0, 60.0  # a person waits at the terminal


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The rewards and their settings, from the command line."""

    names: tuple[str, ...] = ()  # of the file's rewards where there is one; empty: all of them
    file: Path | None = None  # a recipe, or a file of [[rewards]] alone
    paths: tuple[str, ...] = ()  # [NAME=]PATH
    options: tuple[str, ...] = ()  # [NAME.]key=value
    settings: tuple[str, ...] = ()  # [NAME.]key=value, of the spec's other keys


@dataclass(frozen=True)
class Servers:
    """Running reward servers; without urls the rewards are loaded in this process."""

    urls: tuple[str, ...] = ()
    token_file: Path | None = None  # None: the environment variable FASTGRPO_TOKEN


@dataclass(frozen=True)
class Verdict:
    """A reward's scores of one clip, and the reason why some or all of them are missing."""

    scores: dict[str, float]  # part -> score, NaN where it is missing
    kind: str | None = None
    """Why a score is missing: an error's class, "no score", "not finite", "malformed", "server"."""
    reason: str = ""  # the same in words


def specs(asked: Asked) -> list[RewardSpec]:
    """The rewards with their settings. Raises UserError for an unknown reward or setting."""
    trees = {name: spec.model_dump() for name, spec in _chosen(asked).items()}
    for text in asked.paths:
        name, equals, path = text.partition("=")
        if not (equals and name in trees):
            name, path = _only(trees, f"--path={text}", "NAME=PATH"), text
        trees[name]["path"] = paths.whole_or_hub(path, "--path")
    for text in asked.options:
        _assign(trees, "--option", text, ("options",))
    for text in asked.settings:
        _assign(trees, "--set", text, ())
    return [
        config.section(RewardSpec, "rewards", with_paths(tree, ("rewards", "0")))
        for tree in trees.values()
    ]


def _chosen(asked: Asked) -> dict[str, RewardSpec]:
    """The rewards by name, before the command line's settings."""
    doubled = [name for name in asked.names if asked.names.count(name) > 1]
    if doubled:
        raise UserError(f"--reward={doubled[0]}: is named twice; name it once.")
    if asked.file is None:
        if not asked.names:
            known = ", ".join(rewards.known())
            raise UserError(f"--reward: missing; name one of {known}, or give --recipe FILE.")
        specs = [rewards.plain(name) for name in asked.names]
        for spec in specs:
            rewards.check(spec)
        return {spec.name: spec for spec in specs}
    found = read(asked.file)
    for name in asked.names:
        if name not in found:
            raise UserError(
                f"--reward={name}: {asked.file} has no such reward; it has {', '.join(found)}.",
            )
    return {name: found[name] for name in asked.names or found}


def read(file: Path) -> dict[str, RewardSpec]:
    """The rewards of a recipe by name, or of a file of [[rewards]] alone.

    In the latter `weights` may be left out.
    """
    tree = config.read_tree(file)
    entries = tree.get("rewards")
    alone = isinstance(entries, list) and set(tree) == {"rewards"}
    tables = [entry for entry in entries or [] if isinstance(entry, dict)] if alone else []
    if alone and len(tables) == len(entries or []):
        trees: list[dict[str, Any]] = [{"weights": {}} | entry for entry in tables]
        listed = [config.section(RewardSpec, "rewards", entry) for entry in trees]
    else:
        listed = list(config.parse(tree).rewards)
    by_name = {spec.name: spec for spec in listed}
    if len(by_name) < len(listed):
        raise UserError(f"rewards: {file} names a reward twice; leave one of them out.")
    return by_name


def _assign(
    trees: Mapping[str, dict[str, Any]],
    option: str,
    text: str,
    below: tuple[str, ...],
) -> None:
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
            raise UserError(f"{option}={text}: '{step}' has no keys below it; end the name there.")
    node[keys[-1]] = config.value_of(("rewards", "0", *below, *keys), value)


def _only(trees: Mapping[str, object], option: str, form: str) -> str:
    """The only reward, for an option that names no reward."""
    if len(trees) > 1:
        raise UserError(f"{option}: of which reward ({', '.join(trees)})? Write it as {form}.")
    return next(iter(trees))


class RecordingReward(RewardWrapper):
    """A reward that records why a clip has no score, and otherwise is the reward itself."""

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)
        self.trouble: tuple[str, str] | None = None  # (kind, reason) of the last call

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """The reward's scores; an error is noted and raised.  pixels: uint8 [B, F, H, W, 3]"""
        self.trouble = ("malformed", "it did not give one score per part and clip")
        try:
            scores = self.reward(pixels, prompts, fps)
        except Exception as error:  # anyone's code, as in rewards.judge_batch, which deals with it
            self.trouble = (type(error).__name__, described(error).partition(": ")[2])
            raise
        odd = {part: own for part, own in scores.values.items() if not torch.isfinite(own).all()}
        if not scores.valid.all():
            self.trouble = ("no score", "the reward gives none for this clip")
        elif odd:
            values = [f"{part}={float(own.flatten()[0])}" for part, own in odd.items()]
            self.trouble = ("not finite", ", ".join(values))
        return scores


@dataclass
class Judges:
    """Open rewards. A clip's verdicts depend on that clip, its prompt and its frame rate alone."""

    sources: Sequence[Source]
    parts: dict[str, tuple[str, ...]]  # reward -> all that it scores
    recorders: dict[str, RecordingReward] = field(default_factory=dict)
    """The rewards in this process, by name."""

    @property
    def read_prompts(self) -> bool:
        """Whether any reward may read prompts, as every reward behind a server may."""
        served = [name for name in self.parts if name not in self.recorders]
        return bool(served) or any(reward.reads_prompts for reward in self.recorders.values())

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
        """A reward's verdict.  said: the last line that each module logged"""
        values = {part: float(scores.values[part][0]) for part in self.parts[name]}
        missing = [part for part, value in values.items() if math.isnan(value)]
        if not missing:
            return Verdict(values)
        if name not in self.recorders:
            what = f"no {', '.join(missing)}" if scores.valid[0] else "no score"
            return Verdict(values, "server", f"the server gives {what}; its log says why")
        kind, reason = self.recorders[name].trouble or (
            "malformed",
            "it did not give one score per part and clip",
        )
        if kind == "no score":
            reason = said.get(type(self.recorders[name].reward).__module__, reason)
        return Verdict(values, kind, reason)


class _Ear(logging.Handler):
    """A log handler that keeps each module's last line."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self.said[record.name] = record.getMessage()


@contextmanager
def _overheard(listen: bool) -> Iterator[Mapping[str, str]]:
    """Give the rewards' last log lines by module; the table has them in place of the terminal."""
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
def opened(
    specs: Sequence[RewardSpec],
    servers: Servers,
    device: torch.device | None = None,
) -> Iterator[Judges]:
    """Load the rewards, or connect to their servers, for which only names and frame rates count.

    device: of the rewards with device="auto"; None: the CPU
    Raises UserError for a wrong setting, token or address, and for a server without the reward.
    """
    if servers.urls:
        with ExitStack() as stack:
            yield _behind(specs, servers, stack)
        return
    inside = ScorerInProcess(specs, device, OUTAGE_S)
    recorders = {}
    for name, served in inside.served.items():
        served.reward = recorders[name] = RecordingReward(served.reward)
    parts = {name: tuple(served.reward.names) for name, served in inside.served.items()}
    yield Judges([inside], parts, recorders)


def _behind(specs: Sequence[RewardSpec], servers: Servers, stack: ExitStack) -> Judges:
    """Clients of the servers, one for each frame rate of the rewards' specs."""
    token = token_of(servers.token_file, "--token-file")
    groups: dict[float | None, list[str]] = {}
    for spec in specs:
        groups.setdefault(spec.fps, []).append(spec.name)
    sources: list[Source] = []
    parts: dict[str, tuple[str, ...]] = {}
    for fps, names in groups.items():
        client = RewardClient(servers.urls, token, names, outage_s=OUTAGE_S, fps=fps)
        stack.enter_context(client)
        about = client.wait_ready(START_TIMEOUT_S)
        parts |= {name: tuple(about[name]["parts"]) for name in names}
        sources.append(client)
    return Judges(sources, {spec.name: parts[spec.name] for spec in specs})
