"""Which kernels a run may use: the same rounding in rollout and update, and deterministic by choice."""

import os
from pathlib import Path

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import open_world
from fastgrpo.training import methods
from tests.harness import runs


def flags() -> tuple[bool, bool, bool]:
    return (
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_world_has_exact_kernels_and_gives_the_settings_back(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with pytest.raises(UserError, match="planted"), open_world(deterministic=deterministic):
        assert flags() == (False, False, deterministic)
        raise UserError("planted")
    assert flags() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("PYTORCH_ALLOC_CONF", None), ("PYTORCH_ALLOC_CONF", "a:1"), ("PYTORCH_CUDA_ALLOC_CONF", "")],
)
def test_segments_can_grow_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with open_world():
        found = os.environ.get("PYTORCH_ALLOC_CONF")
    chosen = value if name == "PYTORCH_ALLOC_CONF" else None
    assert found == ("expandable_segments:True" if value is None else chosen)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.slow
def test_a_deterministic_run_ends_with_the_weights_of_any_other(tmp_path: Path) -> None:
    """On the CPU every kernel in use is deterministic, which the key proves: it refuses others."""
    for name in ("plain", "deterministic"):
        settings = [*runs.SMALLER, f"run.deterministic={str(name == 'deterministic').lower()}"]
        runs.succeed(tmp_path / name, settings)
    one, other = (runs.checkpoint(tmp_path / n, 2, tmp_path) for n in ("plain", "deterministic"))
    runs.assert_same_checkpoint(one, other)


@pytest.mark.parametrize("kernel", ["sage", "sage_hub", "_sage_qk_int8_pv_fp8_cuda", "_flash_3"])
def test_a_kernel_without_a_backward_is_refused_in_training(kernel: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.attention={kernel}: has no backward"):
        methods.check(config.load(runs.RECIPE, [f"model.attention={kernel}"]))
    methods.check(config.load(runs.RECIPE, ["model.attention=flash"]))
