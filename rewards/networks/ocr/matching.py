"""How near the text that was read is to the text that was asked for."""

import re

QUOTED = re.compile(
    r'"([^"]*)"|\N{LEFT DOUBLE QUOTATION MARK}([^\N{RIGHT DOUBLE QUOTATION MARK}]*)'
    r"\N{RIGHT DOUBLE QUOTATION MARK}"
)
"""Text between a pair of straight or typographic double quotes."""


def quoted(prompt: str) -> str | None:
    """The text between a prompt's first pair of double quotes. None: it has no pair."""
    found = QUOTED.search(prompt)
    return None if found is None else (found[1] if found[1] is not None else found[2])


def plain(text: str) -> str:
    """The letters that are compared: without white space, in lower case."""
    return "".join(text.split()).lower()


def distance(read: str, target: str, surplus: float = 1.0) -> float:
    """Edits that make the target of what was read (Levenshtein 1966).

    surplus: what a letter before or after the best part of `read` costs: 1 is the plain distance,
    0 lets the text around that part go free (Sellers 1980)
    """
    # row[j]: the cheapest way to the target's letters so far from the first j that were read
    row = [surplus * j for j in range(len(read) + 1)]
    for i, wanted in enumerate(target, 1):
        above, row = row, [float(i)]
        for j, letter in enumerate(read, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != wanted)))
    return min(cost + surplus * (len(read) - j) for j, cost in enumerate(row))


def similarity(read: str, target: str, surplus: float, contained_is_perfect: bool) -> float:
    """1 for the text that was asked for, down to 0 where as many edits as it has letters are needed.

    1 - min(d, n) / n, of both texts `plain`, d their distance and n > 0 the target's letters.
    contained_is_perfect: 1 wherever the target is a part of what was read, as in flow_grpo
    """
    read, target = plain(read), plain(target)
    if contained_is_perfect and target in read:
        return 1.0
    return 1.0 - min(distance(read, target, surplus), len(target)) / len(target)
