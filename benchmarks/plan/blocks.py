"""What a block keeps per token and channel, by running one of each kind without contents.

FakeTensorMode on the CPU, diffusers' eager kernels, no sharding. The bytes are linear in the
numbers of tokens, so that three runs with different numbers give the coefficients.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import ROOT
from fastgrpo.core import config
from fastgrpo.models.loading.policies import recomputing
from fastgrpo.parallel import sequence_parallel, world
from fastgrpo.tools.plan.simulation import rank
from fastgrpo.tools.plan.simulation.rank import Sizes
from fastgrpo.tools.plan.subject import family_plan, published

HEADS, WIDTH = 8, 1024
HUNYUAN, FLUX_DEV, SD_1, WAN_14B = (
    published(name) for name in ("hunyuan_video", "flux", "stable_diffusion", "wan")
)
ONE = {
    "num_attention_heads": HEADS,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
}
# the smallest latent and text; what is added to the text
VIDEO, TEXT = (
    ((16, 16, 64, 64), 256),
    2048,  # within Qwen-Image's rotary tables
)
IMAGE = ((16, 1, 128, 128), 512)
KINDS: tuple[
    tuple[str, Mapping[str, Any], int, str, tuple[tuple[int, int, int, int], int]], ...
] = (
    ("hunyuan_video", HUNYUAN | ONE, 0, "dual", VIDEO),
    ("hunyuan_video", HUNYUAN | ONE, 1, "single", VIDEO),
    (
        "flux",
        FLUX_DEV | {k: v for k, v in ONE.items() if k != "num_refiner_layers"},
        0,
        "dual",
        IMAGE,
    ),
    (
        "flux",
        FLUX_DEV | {k: v for k, v in ONE.items() if k != "num_refiner_layers"},
        1,
        "single",
        IMAGE,
    ),
    (
        "wan",
        WAN_14B | {"num_attention_heads": HEADS, "num_layers": 1, "ffn_dim": 5 * WIDTH},
        0,
        "block",
        VIDEO,
    ),
    (
        "wan_i2v",
        WAN_14B | {"num_attention_heads": HEADS, "num_layers": 1, "ffn_dim": 5 * WIDTH},
        0,
        "block",
        VIDEO,
    ),
)
MMDIT = published("stable_diffusion_3") | {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "num_layers": 3,
    "caption_projection_dim": WIDTH,
    "dual_attention_layers": (0,),
}
QWEN = published("qwen_image") | {"num_attention_heads": HEADS, "num_layers": 2}
FLUX_2 = published("flux_2") | {
    "num_attention_heads": HEADS,
    "num_layers": 1,
    "num_single_layers": 1,
}
HUNYUAN_15 = published("hunyuan_video_15") | {
    "num_attention_heads": HEADS,
    "num_layers": 2,
    "num_refiner_layers": 1,
}
KINDS += (
    ("flux_2", FLUX_2, 0, "dual", ((32, 1, 128, 128), 512)),
    ("flux_2", FLUX_2, 1, "single", ((32, 1, 128, 128), 512)),
    ("hunyuan_video_15", HUNYUAN_15, 0, "block", ((32, 16, 32, 32), 256)),
    ("qwen_image", QWEN, 0, "block", IMAGE),
    ("stable_diffusion_3", MMDIT, 0, "two", IMAGE),
    ("stable_diffusion_3", MMDIT, 1, "one", IMAGE),
)
WAN_IMAGE = published("wan_i2v_14b") | {
    "num_attention_heads": HEADS,
    "num_layers": 1,
    "ffn_dim": 5 * WIDTH,
    "added_kv_proj_dim": WIDTH,
}
KINDS += (("wan_i2v_14b", WAN_IMAGE, 0, "block", VIDEO),)
LUMINA = published("z_image") | {
    "n_heads": HEADS,
    "dim": WIDTH,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "axes_lens": (4096, 512, 512),
}
KINDS += (
    ("z_image", LUMINA, 0, "image", IMAGE),
    ("z_image", LUMINA, 1, "text", IMAGE),
    ("z_image", LUMINA, 2, "both", IMAGE),
)
COSTS = ("forward", "saved", "working", "moved")


def calibrate() -> None:
    """Print the coefficients of each kind, in both precisions, on one rank and with sequence
    parallelism.
    """
    for dtype in ("bfloat16", "float32"):
        for sp in (1, 4):
            for family, settings, place, name, (latent, text) in KINDS:
                found = coefficients(
                    family,
                    settings=settings,
                    place=place,
                    dtype=dtype,
                    sp=sp,
                    latent=latent,
                    text=text,
                )
                columns = ", ".join(
                    f"{cost} {video:.1f} {words:.1f}" for cost, (video, words) in found.items()
                )
                print(
                    f"{dtype:<9} sp {sp} {family:<14}{name:<7} bytes per video and text token: "
                    f"{columns}",
                    flush=True,
                )
        for place in range(8):
            small, large = (
                costs(
                    "stable_diffusion",
                    settings=SD_1,
                    place=place,
                    dtype=dtype,
                    sp=1,
                    latent=(4, 1, h, 64),
                    text=77,
                )
                for h in (64, 128)
            )
            columns = ", ".join(
                f"{cost} {(large[cost] - small[cost]) / 64 / 64 / 320:.2f}" for cost in COSTS
            )
            print(
                f"{dtype:<9} stable_diffusion level {place}: bytes per place and channel: "
                f"{columns}",
                flush=True,
            )


def coefficients(
    family: str,
    settings: Mapping[str, Any],
    place: int,
    dtype: str,
    sp: int,
    latent: tuple[int, int, int, int],
    text: int,
) -> dict[str, tuple[float, float]]:
    """Bytes per channel of a video token of this rank, and of a text token (Wan's are always 512:
    0).
    """
    channels, frames, height, width = latent
    longer = (channels, frames, 2 * height, width)
    first = costs(
        family, settings=settings, place=place, dtype=dtype, sp=sp, latent=latent, text=text
    )
    video = costs(
        family, settings=settings, place=place, dtype=dtype, sp=sp, latent=longer, text=text
    )
    words = (
        first
        if family.startswith("wan")
        else costs(
            family,
            settings=settings,
            place=place,
            dtype=dtype,
            sp=sp,
            latent=latent,
            text=text + TEXT,
        )
    )
    tokens = frames * height * width / family_plan(family, settings).patch ** 2 / sp
    return {
        cost: (
            (video[cost] - first[cost]) / tokens / WIDTH,
            (words[cost] - first[cost]) / TEXT / WIDTH,
        )
        for cost in COSTS
    }


def costs(
    family: str,
    settings: Mapping[str, Any],
    place: int,
    dtype: str,
    sp: int,
    latent: tuple[int, int, int, int],
    text: int,
) -> dict[str, float]:
    """Bytes of one block of a family's network beyond its weights and inputs."""
    if sp > 1:
        dist.init_process_group("fake", rank=0, world_size=sp, store=FakeStore())
    try:
        with FakeTensorMode(), torch.device("cpu"):
            block, arguments, keywords = _block(
                family,
                settings=settings,
                place=place,
                dtype=dtype,
                sp=sp,
                sizes=Sizes(latent, text),
            )
            return _measured(block, arguments, keywords)
    finally:
        if sp > 1:
            dist.destroy_process_group()


def _block(
    family: str, settings: Mapping[str, Any], place: int, dtype: str, sp: int, sizes: Sizes
) -> tuple[nn.Module, Any, Any]:
    """The block, and the inputs with which the network calls it, as leaves that want gradients."""
    recipe = config.load(
        ROOT / "launch" / "t2v_hunyuan.toml",
        [
            f"model.family={family}",
            f"model.dtype={dtype}",
            "model.gradient_checkpointing=false",
            "model.guidance=none",
        ],
    )
    policy, precision = rank.outline(recipe, settings), getattr(torch, dtype)
    for parameter in policy.network.parameters():
        parameter.data = parameter.data.to(precision)
    if sp > 1:
        assert dist.group.WORLD is not None
        sequence_parallel.install(
            policy.network, world.Group(dist.group.WORLD, 0, sp), policy.share_sequence
        )
    seen: list[tuple[Any, Any]] = []
    block = policy.blocks[place]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    x, t, condition = rank.inputs(recipe, policy, sizes, 1)
    with torch.no_grad():
        policy.velocity(x, t, condition)
    hook.remove()

    def leaf(tensor: Tensor) -> Tensor:
        return (
            tensor.detach().requires_grad_()
            if tensor.dtype == precision and tensor.ndim >= 2
            else tensor
        )

    arguments, keywords = tree_map_only(torch.Tensor, leaf, seen[0])
    return block, arguments, keywords


def _measured(block: nn.Module, arguments: Any, keywords: Any) -> dict[str, float]:
    inputs = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
    tracker = _tracker(block, inputs)
    held, found = _total(tracker, "current"), {}
    # a part of a fake leaf would still want a gradient
    given, named = tree_map_only(torch.Tensor, torch.Tensor.detach, (arguments, keywords))
    with tracker, torch.no_grad():
        block(*given, **named)
    found["forward"] = _total(tracker, "peak") - held
    tracker = _tracker(block, inputs)
    with tracker:
        outputs = [
            leaf for leaf in tree_leaves(block(*arguments, **keywords)) if isinstance(leaf, Tensor)
        ]
        found["saved"] = _total(tracker, "current") - held
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    found["working"] = _total(tracker, "peak") - held
    found["moved"] = float(
        _moved_back(partial(recomputing("products"), block), arguments, keywords)
        - _moved_back(block, arguments, keywords)
    )
    return found


def _moved_back(run: Callable[..., Any], arguments: Any, keywords: Any) -> int:
    """Bytes that a block's backward reads and writes, a recomputation included."""
    outputs = [
        leaf for leaf in tree_leaves(run(*arguments, **keywords)) if isinstance(leaf, Tensor)
    ]
    with Moved() as counted:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return counted.bytes


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write: of each its inputs and outputs, of views
    none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        places = {x.untyped_storage()._cdata for x in read}
        if written and not any(x.untyped_storage()._cdata in places for x in written):
            self.bytes += sum(x.numel() * x.itemsize for x in (*read, *written))
        return out


def _tracker(block: nn.Module, inputs: list[Tensor]) -> MemTracker:
    tracker = MemTracker()
    tracker.track_external(block, *inputs)
    return tracker


def _total(tracker: MemTracker, kind: str) -> float:
    (parts,) = tracker.get_tracker_snapshot(kind).values()
    return float(parts["Total"])
