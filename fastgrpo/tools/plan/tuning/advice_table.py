"""Advice on a terminal and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fastgrpo.core.units import GIB
from fastgrpo.run.terminal import open_console
from fastgrpo.tools.plan.tables import brief
from fastgrpo.tools.plan.tuning.advice import Advice


def show(advice: Sequence[Advice], within: float) -> None:
    """Print the rungs, and what to paste behind the command for the first that fits and for the
    first that is quick enough.

    within: seconds of an iteration that are quick enough
    """
    console = open_console()
    console.print(_rungs(advice))

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    fitting = [one for one in advice if one.tuned is not None]
    if not fitting:
        tell("nothing near it fits on these GPUs: use more of them, or larger ones")
        return
    tell(f"the first that fits: {' '.join(fitting[0].overrides) or 'the recipe as it is'}")
    last = fitting[-1]
    if _seconds(last) > within:
        tell(f"none takes at most {brief(within)} s per iteration; the last that fits:")
    elif last is not fitting[0]:
        tell(f"the first with at most {brief(within)} s per iteration:")
    if last is not fitting[0]:
        tell(f"  {' '.join(last.overrides)}")


def _seconds(one: Advice) -> float:
    assert one.tuned is not None
    return one.tuned.plan.seconds


def _rungs(advice: Sequence[Advice]) -> Table:
    table = Table(
        title="what to give up, the least first; seconds of an iteration, hours of the run"
    )
    table.add_column("given up", no_wrap=True)
    for column in ("seconds", "hours", "GiB", "host GiB", "fits"):
        table.add_column(column, justify="right")
    for one in advice:
        if one.tuned is None:
            table.add_row(one.change, "", "", "", "", "no")
            continue
        found = one.tuned.plan
        table.add_row(
            one.change,
            brief(found.seconds),
            brief(found.gpu_hours / found.subject.job.gpus, 1),
            f"{found.worst.peak / GIB:.1f}",
            f"{sum(found.host.values()) / GIB:,.0f}",
            "yes",
        )
    return table


def as_json(advice: Sequence[Advice]) -> list[dict[str, Any]]:
    """The rungs; memory in bytes."""
    return [
        {
            "change": one.change,
            "given_up": list(one.given_up),
            "overrides": list(one.overrides),
            "fits": one.tuned is not None,
            "seconds_per_iteration": one.tuned and one.tuned.plan.seconds,
            "peak": one.tuned and one.tuned.plan.worst.peak,
            "host_bytes_per_node": one.tuned and sum(one.tuned.plan.host.values()),
        }
        for one in advice
    ]
