"""The learning rate of each optimizer step, against the closed forms."""

import pytest

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.training.trainer import rate, schedule_of
from tests.harness import runs, tiny


@pytest.mark.parametrize("schedule", ["linear", None, "cosine", "constant"])
def test_the_rate_follows_its_schedule(schedule: str | None) -> None:
    changed = {"warmup_updates": 3, "decay_updates": 0 if schedule == "constant" else 8}
    settings = tiny.settings(8, lr=1.0).model_copy(update=changed | {"schedule": schedule})
    rates = [rate(settings, updates) for updates in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    # a quarter, a half and the whole of the way
    ways = {"cosine": [0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1], "constant": [1.0] * 3}
    expected = ways.get(str(schedule), [0.775, 0.55, 0.1])
    assert [rates[5], rates[7], rates[11]] == pytest.approx(expected)
    assert rates[19] == pytest.approx(rates[11])


def test_a_schedule_without_a_length_ends_with_the_run() -> None:
    more = ["optimizer.schedule=cosine", "run.iterations=10", "optimizer.warmup_updates=4"]
    recipe = config.load(runs.RECIPE, [*more, "optimizer.decay_updates=0"])
    assert schedule_of(recipe).decay_updates == 6
    assert schedule_of(config.load(runs.RECIPE, more)).decay_updates == 76
    with pytest.raises(UserError, match=r"optimizer\.decay_updates=76: has no effect with"):
        config.load(runs.RECIPE, ["optimizer.schedule=constant"])
