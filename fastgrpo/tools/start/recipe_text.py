"""A recipe's text with keys set, its comments and its order as they are."""

import re
from typing import Any

import tomli_w

HEADER = re.compile(r"\[\[?[a-z]+\]\]?\s*(#.*)?$")


def with_value(text: str, key: str, value: Any, note: str) -> str:
    """The text with a key set, and what stands behind it as a comment.

    key: as an override names it, `section.key` or `rewards.0.key`; in the text its value stands on
    one line. A key or section that is not there is added.
    """
    section, *place, name = key.split(".")
    header, number = (f"[[{section}]]", int(place[0])) if place else (f"[{section}]", 0)
    lines = text.rstrip("\n").split("\n")
    line = f"{tomli_w.dumps({name: value}).strip()}  # {note}"
    starts = [n for n, one in enumerate(lines) if one.split("#")[0].strip() == header]
    if len(starts) <= number:
        return "\n".join([*lines, "", header, line]) + "\n"
    first = starts[number] + 1
    after = (n for n in range(first, len(lines)) if HEADER.match(lines[n]))
    end = next(after, len(lines))
    for n in range(first, end):
        if re.match(rf"{name}\s*=", lines[n]):
            lines[n] = line
            break
    else:
        while not lines[end - 1].strip():
            end -= 1
        lines.insert(end, line)
    return "\n".join(lines) + "\n"
