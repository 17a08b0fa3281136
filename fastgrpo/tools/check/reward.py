"""`fastgrpo check-reward`: whether a reward keeps the contract, and what a clip takes."""

from itertools import cycle, islice
from pathlib import Path

import torch

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import PromptText
from fastgrpo.data import prompt_files
from fastgrpo.tools.check import reward_contract
from fastgrpo.tools.check.reward_contract import Tried
from fastgrpo.tools.score import clip_files


def check_reward(spec: RewardSpec, tried: Tried | None, behind_server: bool) -> int:
    """Check a reward by each rule and print what came of it.

    tried: None: the reward's examples
    behind_server: whether to start a server for it, too
    returns 0 where it keeps them all, else 1
    Raises UserError where the reward cannot be loaded.
    """
    rules = [name for name in reward_contract.RULES if behind_server or name != "server"]
    found = reward_contract.contract(spec, rules, tried)
    width = max(map(len, rules))
    for name, broken in found.items():
        kept = reward_contract.RULES[name][1]
        print(f"{'BROKEN' if broken else 'ok':8}{name:{width + 2}}{kept}")
        for line in broken:
            print(f"{'':8}{'':{width + 2}}but {line}")
    if any(found.values()):
        return 1
    seconds, size = reward_contract.seconds_per_clip(spec, tried)
    print(f"{spec.name} takes {seconds * 1e3:.3g} ms per clip of {size}.")
    return 0


def clips_of(folder: Path) -> Tried:
    """The clips of a folder, with their prompts as `fastgrpo score` finds them.

    Raises UserError where one cannot be read, where they differ in size, and for fewer than two.
    """
    files = clip_files.expand([folder])
    texts = clip_files.captions(files, None, None)
    pixels = [clip_files.read(file, None, None).pixels for file in files]
    if len(files) < 2:
        raise UserError(f"--clips={folder}: has one clip; give two or more that differ.")
    other = next((n for n, one in enumerate(pixels) if one.shape != pixels[0].shape), None)
    if other is not None:
        raise UserError(
            f"--clips={folder}: {files[other].name} has {list(pixels[other].shape)}, and "
            f"{files[0].name} {list(pixels[0].shape)}; give clips of one size and length."
        )
    return Tried(torch.stack(pixels), [text or "" for text in texts])


def with_rows(spec: RewardSpec, tried: Tried | None, file: Path) -> Tried:
    """Clips whose prompts have, in turn, what the rows of a prompt file say beside their text.

    tried: None: drawn clips
    Raises UserError for a file that cannot be read, a column that none of its first rows has, and a
    reward that reads none.
    """
    columns = rewards.columns(spec)
    if not columns:
        raise UserError(
            f"--rows={file}: {spec.name} reads no rows; name their columns at the top of its file, "
            "such as COLUMNS = ('size',)."
        )
    tried = tried or Tried(reward_contract.clips(), reward_contract.CAPTIONS)
    asked = {f"COLUMNS ({column})": column for column in columns}
    rows = list(islice(prompt_files.rows(str(file), "--rows", asked), len(tried.prompts)))
    values = [{column: row.value(column) for column in columns} for row in rows]
    for column in columns:
        if all(row[column] is None for row in values):
            there = ", ".join(rows[0].values) if rows else "no rows"
            raise UserError(
                f"--rows={file}: has no {column}, which {spec.name} reads; it has {there}."
            )
    given = zip(tried.prompts, cycle(values), strict=False)
    return Tried(tried.pixels, [PromptText(text, row) for text, row in given])
