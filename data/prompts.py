"""Prompts: text files with one per line, and the order in which iterations draw them."""

from pathlib import Path

from fastgrpo import noise
from fastgrpo.errors import UserError


def read(path: str, field: str) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped, repeated ones kept once.

    field: the recipe key to name in an error.  Raises UserError for a missing, empty or non-UTF-8 file.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{field}={path}: {problem}; give a text file with one prompt per line.") from None
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{field}={path}: line {line} is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8."
        ) from None
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not prompts:
        raise UserError(f"{field}={path}: the file has no prompts; write one per line.")
    return prompts


def draw(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts of an iteration: a keyed permutation of all `count` per epoch, read on without a gap."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(iteration * per_iteration, (iteration + 1) * per_iteration):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = noise.permutation(count, ("prompt order", seed, epoch))
        chosen.append(orders[epoch][place])
    return chosen
