"""What a recipe may ask of any family's network: the attention kernel."""

from pathlib import Path

import pytest
import torch

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
