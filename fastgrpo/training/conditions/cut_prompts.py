"""Prompts that are longer than a text encoder sees: counted, listed in a file, or refused."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.core.policy import Prompt
from fastgrpo.training.conditions.cache import Cache

SHOWN = 3
Seen = Mapping[str, Sequence[int]]  # encoder -> (tokens that it sees, tokens of the text)


def of_cache(cache: Cache) -> dict[int, Seen]:
    """Index among all prompts -> the encoders that cut it, of those that are cut."""
    every: dict[int, Seen] = {}
    for number in range(cache.parts):
        every |= cache.cut(number)
    return every


def problems(cut: Mapping[int, Seen], prompts: Sequence[Prompt]) -> dict[int, str]:
    """Index -> what is wrong with that prompt where prompts.too_long=refuse."""
    return {
        index: f"{_named(prompts[index], seen)}; shorten it, or set prompts.too_long=cut."
        for index, seen in cut.items()
    }


def refuse_negative(cache: Cache, too_long: str) -> str | None:
    """What to tell of a negative prompt that is cut. Raises UserError where that is refused."""
    seen = cache.cut_negative()
    if seen and too_long == "refuse":
        raise UserError(
            f"model.negative_prompt: {counts(seen)}; shorten it, or set prompts.too_long=cut."
        )
    return f"model.negative_prompt is cut: {counts(seen)}" if seen else None


def summary(cut: Mapping[int, Seen], prompts: Sequence[Prompt], listed: Path | None) -> str | None:
    """One line: how many prompts each encoder cuts, and the first of them; None: none is cut.

    listed: the file that names them all; None: the line names three
    """
    if not cut:
        return None
    numbers = Counter(part for seen in cut.values() for part in seen)
    each = ", ".join(f"{part} cuts {count:,}" for part, count in sorted(numbers.items()))
    named = [_named(prompts[index], cut[index]) for index in sorted(cut)[: 1 if listed else SHOWN]]
    line = f"prompts: {len(cut):,} are longer than an encoder sees ({each}), such as "
    return line + "; ".join(named) + (f"; all are named in {listed}" if listed else "")


def write_list(cut: Mapping[int, Seen], prompts: Sequence[Prompt], file: Path) -> None:
    """Name every prompt that is cut in a JSON file; without any there is none."""
    if not cut:
        file.unlink(missing_ok=True)
        return
    entries = [
        {"place": prompts[i].place, "prompt": prompts[i].text, "tokens_seen": dict(cut[i])}
        for i in sorted(cut)
    ]
    content = {"about": "encoder -> [tokens that it sees, tokens of the prompt]", "cut": entries}
    replace_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _named(prompt: Prompt, seen: Seen) -> str:
    return f"{prompt.place or prompt.text[:40]}: {counts(seen)}"


def counts(seen: Seen) -> str:
    """The numbers of tokens by encoder, in words."""
    parts = [f"{part} sees {least} of its {all_} tokens" for part, (least, all_) in seen.items()]
    return " and ".join(parts)
