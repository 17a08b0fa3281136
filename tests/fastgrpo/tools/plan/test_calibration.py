"""`fastgrpo plan --calibration`: measured numbers replace the table's; mistakes are one line."""

import json
from pathlib import Path

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.tools.plan.gpus import Achieved, calibrated, gpu
from tests import ROOT

PLAN = ("plan", str(ROOT / "launch" / "t2v_hunyuan.toml"), "--gpus", "64", "--gpu", "h100")


def phases(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, float]:
    """Seconds of each phase, as the command prints them."""
    assert cli.main([*PLAN, "--json", *more]) == 0
    told = json.loads(capsys.readouterr().out)
    return {phase["name"]: phase["seconds"] for phase in told["phases"]}


def test_measured_numbers_change_the_seconds_and_set_overrides_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"machine": "a card", "numbers": {"rollout": 0.25, "tflops": 989}}))
    card, achieved = calibrated(gpu("h100"), Achieved(), file)
    assert (card, achieved) == (gpu("h100"), Achieved(rollout=0.25))
    plain, measured = phases(capsys), phases(capsys, "--calibration", str(file))
    assert measured["rollout"] == pytest.approx(2 * plain["rollout"], rel=1e-3)
    assert measured["update"] == plain["update"]
    again = phases(capsys, "--calibration", str(file), "--set", "rollout=0.5")
    assert again["rollout"] == pytest.approx(plain["rollout"], rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("not JSON", "cannot be read"),
        ("[1]", "is not a JSON object"),
        ("{}", "has no object 'numbers' with figures"),
        ('{"numbers": {}}', "has no object 'numbers' with figures"),
        ('{"numbers": {"rollout": "half"}}', "rollout is no number"),
        ('{"numbers": {"rollout": true}}', "rollout is no number"),
        ('{"numbers": {"rolout": 0.5}}', "calibration.json: rolout: no such number; use one of"),
        (
            '{"numbers": {"rollout": 1.5}}',
            "calibration.json: rollout=1.5: must be a share from 0 to 1",
        ),
        ('{"numbers": {"tflops": NaN}}', "calibration.json: tflops=nan: must be above 0"),
        ('{"numbers": {"tflops": Infinity}}', "calibration.json: tflops=inf: must be above 0"),
    ],
)
def test_mistakes_are_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    if text is not None:
        file.write_text(text)
    assert cli.main([*PLAN, "--calibration", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
