"""A text encoder whose blocks come one by one computes what the whole one does, and is counted."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from benchmarks.plan.text_encoders import ENCODERS, held
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.models.loading import policies
from fastgrpo.models.placement.moving_blocks import MovingBlocks, blocks_of, tensors_of
from fastgrpo.models.placement.text_network import TextNetwork, Work
from fastgrpo.models.sizes import text_encoders
from fastgrpo.models.sizes.text_encoders import LLAMA_3_8B, QWEN_3_4B, T5_XXL, Published, Sizes
from fastgrpo.models.text_encoders.passes import passes_of
from fastgrpo.parallel.world import open_world
from tests.harness import tiny

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 36).reshape(3, 11)
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 5, "vocab_size": 99}
LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
MADE: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**LAYERS)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**LAYERS)),
}


def made(name: str) -> Any:
    """A small encoder in bfloat16, the same each time."""
    torch.manual_seed(5)
    network = MADE[name]().to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.3)
    return network


@pytest.mark.parametrize("way", ["streamed", "sharded"])
@pytest.mark.parametrize("name", MADE)
def test_blocks_that_come_compute_what_the_whole_network_does(name: str, way: str) -> None:
    expected = made(name)(TOKENS, output_hidden_states=True).hidden_states
    network = made(name)
    with open_world():
        moving = MovingBlocks(network, CPU, way)
        for _ in range(2):  # the second forward begins with the first block again
            found = network(TOKENS, output_hidden_states=True).hidden_states
            assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
        moving.close()


def test_a_block_has_contents_only_while_it_computes() -> None:
    network, seen = made("llama"), list[int]()
    moving = MovingBlocks(network, CPU, "streamed")
    blocks = blocks_of(network)

    def count(*_: object) -> None:
        seen.append(sum(any(t.numel() for t in tensors_of(block)) for block in blocks))

    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    network(TOKENS)
    assert seen == [1] * len(blocks)
    assert len(hooks) == len(blocks) and len(moving.buffers) == 2
    with pytest.raises(RuntimeError):
        blocks[0](torch.zeros(1, 3, 32, dtype=torch.bfloat16)[..., :0])
    moving.close()


def test_the_blocks_of_a_network_are_its_outermost_lists() -> None:
    assert [len(blocks_of(made(name))) for name in MADE] == [5, 5, 5, 5]
    assert blocks_of(nn.Linear(2, 2)) == []


SIZES = Sizes(outside=1.0, blocks=24.0, largest=1.0, at_work=2.0)


@pytest.mark.parametrize(
    ("wanted", "ranks", "room", "way"),
    [
        ("auto", 8, 27.0, "whole"),
        ("auto", 8, 26.9, "sharded"),  # 1 + 2 + 2 + 24 / 8
        ("auto", 8, 8.0, "sharded"),
        ("auto", 8, 7.9, "streamed"),
        ("auto", 1, 26.9, "streamed"),
        ("auto", 1, 5.0, "streamed"),
        ("auto", 1, 4.9, None),
        ("whole", 8, 26.9, None),
        ("sharded", 2, 17.0, "sharded"),
        ("streamed", 8, 99.0, "streamed"),
    ],
)
def test_the_quickest_way_that_fits_is_taken(
    wanted: str, ranks: int, room: float, way: str | None
) -> None:
    assert SIZES.way(wanted, ranks, room) == way


@pytest.mark.parametrize(
    ("wanted", "free", "message"),
    [
        ("whole", 80_000, "use streamed, or auto"),
        ("auto", 20_000, "stop what else is on that GPU, or encode on a larger one"),
    ],
)
def test_what_fits_nowhere_is_refused_with_the_remedy(
    wanted: str, free: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = TextNetwork(made("t5"), "text_encoder_2", CPU)
    network.wanted = wanted
    network.work = Work(texts=1, longest=11, per_channel=29.0)
    monkeypatch.setattr(network, "_room", lambda together: float(free))
    start = rf"model\.text_encoders={wanted}: text_encoder_2 takes .* GiB are free; {message}"
    with pytest.raises(UserError, match=start):
        network.place()


def test_one_rank_has_nobody_to_share_with() -> None:
    network = TextNetwork(made("t5"), "text_encoder", CPU)
    network.wanted = "sharded"
    with open_world(), pytest.raises(UserError, match="there is one rank"):
        network.place(together=True)


def test_one_encoder_is_freed_before_the_next_is_placed() -> None:
    settings = Model(family="hunyuan_video", path=str(tiny.FOLDER))
    prompts, alive = [Prompt("a red circle")], list[list[bool]]()
    with policies.encoder(settings, Video(frames=9, height=24, width=40), CPU) as encoder:
        passes = passes_of(encoder)
        networks = [weakref.ref(one.networks[0].network) for one in passes]
        for one in passes:
            one.run(prompts)
            alive.append([network() is not None for network in networks])
            one.free()
            gc.collect()
        alive.append([network() is not None for network in networks])
    assert alive == [[True, True], [False, True], [False, False]]


PUBLISHED = {
    name: text for name, text in vars(text_encoders).items() if isinstance(text, Published)
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_plan_has_the_published_encoders_sizes(name: str) -> None:
    with torch.device("meta"):
        network = ENCODERS[name](PUBLISHED[name].blocks)
    blocks = [sum(t.numel() for t in block.parameters()) for block in blocks_of(network)]
    planned = PUBLISHED[name]
    assert planned.block == pytest.approx(max(blocks), rel=1e-3)
    outside = sum(t.numel() for t in network.parameters()) - sum(blocks)
    if not name.startswith("CLIP"):  # of which some have a projection
        assert planned.outside == pytest.approx(outside, rel=1e-3)
    assert planned.width == network.config.hidden_size


@pytest.mark.parametrize(
    ("planned", "inputs"),
    [
        (T5_XXL.read_as("", texts=32, longest=512), {}),
        (
            LLAMA_3_8B.read_as("", texts=8, longest=351, states=True),
            {"output_hidden_states": True, "use_cache": False},
        ),
        (
            QWEN_3_4B.read_as("", texts=8, longest=512, states=True),
            {"output_hidden_states": True, "use_cache": False},
        ),
    ],
)
def test_the_plan_has_what_an_encoder_holds_at_work(
    planned: Published, inputs: dict[str, object]
) -> None:
    name = next(name for name, text in PUBLISHED.items() if text.block == planned.block)
    few = replace(planned, blocks=2)
    exact = held(name, few.texts, few.longest, few.blocks, **inputs)
    assert exact <= few.sizes(2).at_work <= 1.15 * exact
