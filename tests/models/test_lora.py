"""Adapters: what they are put on, that only they train, and that diffusers loads what is
exported.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from fastgrpo.core.config import Lora, Model
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import stack
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import add_adapters, at_rest, merged, save_adapters, target_layers
from fastgrpo.parallel import sharding
from fastgrpo.parallel.precision import stays_float32
from fastgrpo.parallel.world import World
from fastgrpo.training.policies import Unadapted
from tests.harness import forks, tiny
from tests.harness.folders import stable_diffusion
from tests.harness.workers import lora
from tests.harness.workers.lora import stir

LORA = Lora(rank=3, alpha=4.5)


def seeded(network: type[nn.Module], **config: object) -> nn.Module:
    torch.manual_seed(0)
    return network(**config).requires_grad_(False)


def hunyuan() -> nn.Module:
    return seeded(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def flux() -> nn.Module:
    return seeded(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def wan() -> nn.Module:
    return seeded(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )


def unet() -> nn.Module:
    torch.manual_seed(0)
    return stable_diffusion.unet().requires_grad_(False)


def output(network: nn.Module) -> Tensor:
    """Of any of the four, for fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t, g = torch.tensor([500.0]), torch.tensor([3.5])
    inputs: dict[type[nn.Module], dict[str, Tensor]] = {
        HunyuanVideoTransformer3DModel: {
            "hidden_states": random(1, 4, 1, 4, 4),
            "timestep": t,
            "encoder_hidden_states": random(1, 5, 16),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
            "pooled_projections": random(1, 8),
            "guidance": g * 1000,
        },
        FluxTransformer2DModel: {
            "hidden_states": random(1, 4, 16),
            "timestep": t / 1000,
            "encoder_hidden_states": random(1, 5, 16),
            "pooled_projections": random(1, 8),
            "guidance": g,
            "img_ids": random(4, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        WanTransformer3DModel: {
            "hidden_states": random(1, 4, 1, 4, 4),
            "timestep": t,
            "encoder_hidden_states": random(1, 5, 16),
        },
        UNet2DConditionModel: {
            "sample": random(1, 4, 8, 8),
            "timestep": t,
            "encoder_hidden_states": random(1, 5, stable_diffusion.WIDTH),
        },
    }
    with torch.no_grad():
        return network(**inputs[type(network)], return_dict=False)[0]


def hunyuan_pipeline(transformer: nn.Module) -> Any:
    return HunyuanVideoPipeline(None, None, transformer, None, None, None, None)


def flux_pipeline(transformer: nn.Module) -> Any:
    return FluxPipeline(None, None, None, None, None, None, transformer)


def wan_pipeline(transformer: nn.Module) -> Any:
    return WanPipeline(None, None, None, None, transformer)


def stable_diffusion_pipeline(network: nn.Module) -> Any:
    return StableDiffusionPipeline(
        stable_diffusion.vae(), None, None, network, None, None, None, requires_safety_checker=False
    )


FAMILIES = {
    "hunyuan_video": (hunyuan, hunyuan_pipeline, "transformer"),
    "flux": (flux, flux_pipeline, "transformer"),
    "wan": (wan, wan_pipeline, "transformer"),
    "stable_diffusion": (unet, stable_diffusion_pipeline, "unet"),
}


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_alone_are_trained(family: str) -> None:
    network, before = FAMILIES[family][0](), output(FAMILIES[family][0]())
    names = {name.removesuffix(".weight") for name, p in network.named_parameters() if p.ndim == 2}
    add_adapters(network, LORA)
    assert torch.equal(output(network), before)
    state = state_of(network)
    assert state and all(value.dtype == torch.float32 for value in state.values())
    for name, value in state.items():
        layer, matrix, adapter, weight = name.rsplit(".", 3)
        assert layer in names and (adapter, weight) == ("default", "weight")
        assert value.shape[0 if matrix == "lora_A" else 1] == LORA.rank
    stir(network)
    assert (output(network) - before).norm() > 0.01 * before.norm()
    with at_rest(network):
        assert torch.equal(output(network), before)
    assert not torch.equal(output(network), before)


def test_the_start_is_a_function_of_the_layers_names_alone() -> None:
    states = []
    for seed in (1, 2):
        network = hunyuan()
        torch.manual_seed(seed)
        add_adapters(network, LORA)
        states.append(state_of(network))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    downs = [value for name, value in states[0].items() if ".lora_A." in name]
    assert all(
        not torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i] if a.shape == b.shape
    )
    spread = torch.cat([(value * value.shape[1] ** 0.5).flatten() for value in downs])
    assert (
        -1 <= spread.min() < -0.99
        and 0.99 < spread.max() <= 1
        and abs(spread.std().item() - 3**-0.5) < 0.02
    )


ENDINGS = {
    "hunyuan_video": {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    },
    "flux": {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    },
    "wan": {"to_q", "to_k", "to_v", "to_out.0"},
    "stable_diffusion": {"to_q", "to_k", "to_v", "to_out.0"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_every_attention_projection_by_default(family: str) -> None:
    network = FAMILIES[family][0]()
    chosen = target_layers(network, Lora(rank=1))
    ending = {name: name.split(".attn")[-1].split(".", 1)[1] for name in chosen}
    assert set(ending.values()) == ENDINGS[family]
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in name
    ]
    assert set(chosen) == {name for name in linear if name.endswith(tuple(ENDINGS[family]))}


def test_targets_of_the_recipe_are_taken_at_their_word() -> None:
    network = unet()
    chosen = target_layers(network, Lora(rank=1, targets=("attn2.to_v", "linear_1")))
    assert {name.rsplit(".", 2)[-2] for name in chosen} == {"attn2", "time_embedding"} and len(
        chosen
    ) == 5
    add_adapters(network, Lora(rank=1, targets=("attn2.to_v", "linear_1")))
    assert len(state_of(network)) == 2 * len(chosen)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "to_qq",
            r"lora.targets='to_qq': no linear layer .* use some of .*to_k, to_out.0, to_q, to_v",
        ),
        ("attn1", "no linear layer"),
        ("conv1", "no linear layer"),
        ("o_q", "no linear layer"),
    ],
)
def test_an_unknown_target_is_one_line_that_names_what_there_is(target: str, message: str) -> None:
    network = unet()
    with pytest.raises(UserError, match=message) as caught:
        add_adapters(network, Lora(rank=2, targets=("to_q", target)))
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in network.named_parameters()), "nothing half done"


def test_a_network_without_attention_is_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"lora.targets: .*no attention projections of a known name; use some of 0, 1",
    ):
        target_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Lora(rank=1))


def test_a_missing_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora.rank=3: needs peft; pip install 'fastgrpo\[lora\]'"):
        add_adapters(unet(), LORA)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_export_and_gives_the_same(family: str, tmp_path: Path) -> None:
    make, pipeline_of, part = FAMILIES[family]
    network = make()
    add_adapters(network, LORA)
    stir(network)
    file = tmp_path / "adapters.safetensors"
    save_adapters(state_of(network), file, part, LORA)
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "beside").touch()
    assert file.stat().st_mode == (tmp_path / "beside").stat().st_mode  # the umask's

    pipeline = pipeline_of(make())
    before = output(getattr(pipeline, part))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    loaded = output(getattr(pipeline, part))
    torch.testing.assert_close(loaded, output(network), atol=1e-5, rtol=1e-5)
    assert (loaded - before).norm() > 0.01 * before.norm()
    layers = [module for module in getattr(pipeline, part).modules() if hasattr(module, "lora_A")]
    assert 2 * len(layers) == len(load_file(file)) == len(state_of(network)), "none is left out"


def test_an_export_in_half_precision_is_that(tmp_path: Path) -> None:
    network = unet()
    add_adapters(network, LORA)
    save_adapters(
        state_of(network),
        file=tmp_path / "half.safetensors",
        part="unet",
        settings=LORA,
        dtype=torch.bfloat16,
    )
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_checkpoint_without_adapters_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the checkpoint has no adapters"):
        save_adapters(dict(unet().named_parameters()), tmp_path / "none.safetensors", "unet", LORA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_what_the_adapters_give(family: str) -> None:
    make = FAMILIES[family][0]
    network, plain = make(), make()
    add_adapters(network, LORA)
    stir(network)
    state = state_of(network)
    changed = 0
    for name, parameter in plain.named_parameters():
        base = parameter.data
        parameter.data = merged(name, base, state, LORA)
        changed += not torch.equal(parameter.data, base)
    assert changed == len(state) / 2
    torch.testing.assert_close(output(plain), output(network), atol=1e-5, rtol=1e-5)


def test_merged_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, base = (
        torch.randn(shape, generator=generator) for shape in ((3, 40), (30, 3), (30, 40))
    )
    state = {"a.lora_A.default.weight": down, "a.lora_B.default.weight": up}
    half = base.bfloat16()
    exact = half.double() + 1.5 * up.double() @ down.double()
    torch.testing.assert_close(
        merged("a.weight", half.float(), state, LORA).double(), exact, atol=1e-5, rtol=1e-6
    )
    rounded = merged("a.weight", half, state, LORA)
    assert rounded.dtype == torch.bfloat16 and (rounded != exact.bfloat16()).float().mean() < 0.01
    assert merged("a.bias", half, state, LORA) is half


def test_only_frozen_weights_are_kept_in_the_compute_precision() -> None:
    network = wan()
    add_adapters(network, LORA, torch.bfloat16)
    frozen = {name: p.dtype for name, p in network.named_parameters() if not p.requires_grad}
    staying = {name for name in frozen if stays_float32(network, name)}
    assert staying and {frozen[name] for name in staying} == {torch.float32}
    assert {frozen[name] for name in frozen.keys() - staying} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    tables = [buffer.dtype for buffer in network.buffers() if buffer.is_floating_point()]
    assert tables and torch.bfloat16 not in tables


def test_frozen_weights_in_the_compute_precision_lose_nothing(world: World) -> None:
    outputs, x = [], torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = tiny.encode()[:1]
    for frozen in (torch.float32, torch.bfloat16):
        settings = Model(family="hunyuan_video", path=str(tiny.FOLDER), dtype="bfloat16")
        policy = policies.load(settings, torch.device("cpu"))
        x = torch.randn(
            1, *policy.latent_shape(tiny.VIDEO), generator=torch.Generator().manual_seed(0)
        )
        add_adapters(policy.network, LORA, frozen)
        stir(policy.network)
        sharding.shard(policy, world, torch.bfloat16)
        v = policy.velocity(x, torch.tensor([0.5]), stack(conditions))
        v.square().sum().backward()
        gradients = [p.grad for p in policy.network.parameters() if p.grad is not None]
        whole = [grad.full_tensor().flatten() for grad in gradients]  # type: ignore[attr-defined]
        outputs.append((v.detach(), torch.cat(whole)))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert outputs[0][1].dtype == torch.float32 and outputs[0][1].norm() > 0


def test_two_ranks_train_and_resume_adapters_as_one_does(tmp_path: Path, world: World) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = lora.run(tmp_path / "one", world)
    done = forks.run("tests.harness.workers.lora", [str(tmp_path / "two")], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    two: dict[str, Any] = torch.load(tmp_path / "two" / "result.pt", weights_only=True)

    names = set(one["initial"])
    assert names and all(".lora_" in name for name in names)
    for name in names:
        assert torch.equal(one["initial"][name], two["initial"][name])
    for step, tolerance in ((0, 1e-6), (1, 1e-3)):  # AdamW blows the first step's rounding up
        ours, theirs = one["gradients"][step], two["gradients"][step]
        assert set(ours) == set(theirs) == names and all(grad.any() for grad in ours.values())
        difference = torch.cat([(theirs[name] - grad).flatten() for name, grad in ours.items()])
        assert (
            difference.norm()
            <= tolerance * torch.cat([grad.flatten() for grad in ours.values()]).norm()
        )
    for result, folder in ((one, tmp_path / "one"), (two, tmp_path / "two")):
        assert result["metrics"]["update/max_log_ratio_first"] <= 1e-6
        assert result["progress"] == 1
        for name, value in result["through"].items():
            assert torch.equal(result["resumed"][name], value), name
        stored = FileSystemReader(folder / "checkpoints/step-1").read_metadata().state_dict_metadata
        weights = {name for name in stored if name.startswith(("model.", "ema."))}
        assert weights == {f"{part}.{name}" for part in ("model", "ema") for name in names}
        assert not [name for name in stored if "base_layer" in name]


def test_the_reference_without_adapters_is_the_initial_policy(world: World) -> None:
    """KL and gradients are those of a second, frozen network."""
    policy, initial = lora.load_policy(world, stirred=True), tiny.load_policy(world)
    initial.network.requires_grad_(False)
    conditions, plan = tiny.encode(), replace(tiny.plan(policy), trained=1)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    results = []
    for reference in (initial, Unadapted(policy)):
        trainer = lora.create_trainer(policy, reference, lr=1e-30)
        metrics = lora.train(
            trainer, plan=plan, trajectories=trajectories, conditions=conditions, world=world
        )
        results.append((metrics["update/kl"], trainer.gradients[0]))
    (kl, expected), (ours, gradients) = results
    assert kl > 1e-4 and ours == pytest.approx(kl, rel=1e-6)
    assert all(torch.equal(gradients[name], grad) for name, grad in expected.items())
