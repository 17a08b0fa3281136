"""What a recipe may ask of any family's network: the attention kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.core.config import Model
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import move, stack
from fastgrpo.models.loading import policies
from tests.harness import tiny
from tests.harness.folders import stable_diffusion

CPU = torch.device("cpu")


def settings(attention: str | None) -> Model:
    return Model(family="hunyuan_video", path=str(tiny.FOLDER), attention=attention)


def test_another_kernel_is_used_and_agrees() -> None:
    condition, t = move(stack(tiny.encode()[:1]), CPU), torch.tensor([0.6])
    one = policies.load(settings(None), CPU)
    x = torch.randn(1, *one.latent_shape(tiny.VIDEO), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = one.velocity(x, t, condition)
        other = policies.load(settings("_native_math"), CPU)
        w = other.velocity(x, t, condition)
    other.network.set_attention_backend("native")  # type: ignore[operator]  # diffusers' choice is the process's, too
    assert not torch.equal(v, w)  # the kernels round otherwise
    torch.testing.assert_close(v, w, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", ["flash", "no_such_kernel"])
def test_a_kernel_that_is_not_there_is_one_line(kernel: str) -> None:
    with pytest.raises(
        UserError, match=rf"model.attention={kernel}: .*leave it out for torch's own"
    ) as caught:
        policies.load(settings(kernel), CPU)
    assert "\n" not in str(caught.value)


def test_a_network_without_a_choice_says_so(tmp_path: Path) -> None:
    stable_diffusion.write(tmp_path)
    with pytest.raises(
        UserError, match=r"model.attention=native: a UNet2DConditionModel has no choice of kernels"
    ):
        policies.load(Model(family="stable_diffusion", path=str(tmp_path), attention="native"), CPU)


class Calls(TorchDispatchMode):
    """Counts the calls of attention's forward operator, and of linear layers' products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attention = self.linear = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.attention += "scaled_dot_product" in name and "backward" not in name
        self.linear += name in ("aten.mm.default", "aten.addmm.default")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [
        (False, []),
        (True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (4, [0, 4, 8]),
        (0.3, [3, 6, 9]),
        (0.7, [1, 2, 4, 5, 7, 8, 9]),
    ],
)
def test_a_share_of_the_blocks_is_recomputed(asked: bool | int | float, blocks: list[int]) -> None:
    """Evenly spread; 0.7 of ten blocks are seven of them."""
    model = Model(family="hunyuan_video", path="x", gradient_checkpointing=asked)
    assert [n for n in range(10) if model.recomputes(n)] == blocks
    assert model.gradient_checkpointing == asked and type(model.gradient_checkpointing) is type(
        asked
    )


def test_what_is_kept_is_not_computed_again() -> None:
    """The same gradients, bit for bit, with no more calls of what is kept than without
    recomputation.
    """
    condition, t = move(stack(tiny.encode()[:1]), CPU), torch.tensor([0.6])
    calls, gradients = [], []
    for changes in (
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "keep": "attention"},
        {"gradient_checkpointing": True, "keep": "products"},
        {"gradient_checkpointing": 0.5, "keep": "products"},
    ):
        policy = policies.load(settings(None).model_copy(update=changes), CPU)
        shape = policy.latent_shape(tiny.VIDEO)
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        with Calls() as counted:
            policy.velocity(x, t, condition).square().mean().backward()
        calls.append((counted.attention, counted.linear))
        gradients.append({name: p.grad for name, p in policy.network.named_parameters()})
    plain, again, attention, products, half = calls
    assert again[0] == plain[0] + len(policy.blocks) and again[1] > plain[1]
    assert attention == (plain[0], again[1])
    assert products == half == plain
    for name, grad in gradients[0].items():
        for other in gradients[1:]:
            same = other[name]
            assert grad is not None and same is not None and torch.equal(grad, same), name
