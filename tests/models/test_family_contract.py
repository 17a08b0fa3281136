"""What every file of models/ must have, and that no other file knows one of them by name."""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fastgrpo import models
from fastgrpo.core import config, registry
from fastgrpo.core.config import Model
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Policy
from fastgrpo.models.loading import policies
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.sizes.units import has_part
from fastgrpo.parallel.precision import stays_float32
from fastgrpo.parallel.sequence_parallel import Layout, heads_of, install
from fastgrpo.parallel.world import Group
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from tests import ROOT
from tests.repository.test_repository import files

REQUIRED = {
    "blocks": ["network"],
    "load": ["settings", "device"],
    "encoder": ["settings", "video", "device"],
}
OPTIONAL = {
    "share_sequence": ["network", "layout"],
    "plan": ["config"],
    "simulated": ["config", "settings"],
}
"""Functions of a family's file, and their parameters."""
CONSTANT = re.compile("NETWORKS?|PIPELINES|PIPELINE|PUBLISHED|MAX_[A-Z_]+_TOKENS")
SETTINGS = Model(family="any", path="any")


# --- the contract
# -------------------------------------------------------------------------------------------------


def contract(module: ModuleType) -> list[str]:
    """What is wrong with a family's file, one line each."""
    found = [*members(module), *declarations(module), *torch_in_declarations(file_of(module))]
    if found or not hasattr(module, "plan"):
        return found  # what follows calls these members
    for _, settings in module.PUBLISHED:
        few = shortened(settings)
        found += [*shapes(module, few), *sharing(module, few)]
    return found


def file_of(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)


def members(module: ModuleType) -> Iterator[str]:
    """Members that are missing or of another kind."""
    if getattr(module, "NETWORK", None) not in ("transformer", "unet"):
        yield 'NETWORK: neither "transformer" nor "unet"'
    pipelines = getattr(module, "PIPELINES", None)
    if (
        not isinstance(pipelines, tuple)
        or not pipelines
        or not all(isinstance(name, str) for name in pipelines)
    ):
        yield "PIPELINES: not a tuple of at least one name"
    for name, wanted in (REQUIRED | OPTIONAL).items():
        function = getattr(module, name, None)
        if function is None:
            if name in REQUIRED:
                yield f"{name}: missing"
        elif list(inspect.signature(function).parameters) != wanted:
            yield f"{name}: its parameters are not ({', '.join(wanted)})"
    if hasattr(module, "plan"):
        published = getattr(module, "PUBLISHED", ())
        if not published or published[-1][0] != "":
            yield 'PUBLISHED: its last part of a hub id is not "", which fits any'
        if not hasattr(module, "simulated"):
            yield "simulated: missing, beside a plan"


def declarations(module: ModuleType) -> Iterator[str]:
    """Constants that read otherwise without an import, which runs the top-level statements alone
    that bind them.
    """
    for name in filter(CONSTANT.fullmatch, vars(module)):
        if registry.declared(file_of(module), name, None) != vars(module)[name]:
            yield f"{name}: declared is not what an import gives"


def torch_in_declarations(file: Path) -> list[str]:
    """Constants, and plans of published networks, that cannot be had without torch."""
    script = (
        "import json, pathlib, re, sys; from fastgrpo.core import registry\n"
        "file, found = pathlib.Path(sys.argv[1]), []\n"
        "names = [n for n in registry.top_level(file) if re.fullmatch(sys.argv[2], n)]\n"
        "for name in [*names, 'plan']:\n"
        "    value = registry.declared(file, name, None)\n"
        "    if name == 'plan' and value:\n"
        "        [value(config) for _, config in registry.declared(file, 'PUBLISHED', ())]\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    if heavy and not found: found = [f'{name}: reading it imports {min(heavy)}']\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", script, str(file), CONSTANT.pattern]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told: list[str] = json.loads(done.stdout)
    return told


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config with at most two layers of each kind, and only a few heads: shapes follow the same
    rules.
    """
    return {
        key: min(value, 2) if re.fullmatch(r"n(um)?_(\w+_)?layers", key) else value
        for key, value in settings.items()
    }


def without_weights(module: ModuleType, settings: Mapping[str, Any]) -> Policy:
    """The family's policy around a network of a config, on the meta device."""
    with torch.device("meta"):
        policy: Policy = module.simulated(settings, SETTINGS)
    return policy


def shapes(module: ModuleType, settings: Mapping[str, Any]) -> Iterator[str]:
    """Where the plan of a config is not its class's parameters, or `blocks` not the plan's
    blocks.
    """
    policy, planned = without_weights(module, settings), module.plan(settings)
    assert isinstance(planned, FamilyPlan)
    real = {name: tuple(parameter.shape) for name, parameter in policy.network.named_parameters()}
    written = {
        name: shape for unit in planned.network.all_units for name, shape in unit.weights.items()
    }
    others = sorted(
        name for name in real.keys() | written.keys() if real.get(name) != written.get(name)
    )
    if others:
        yield f"plan: {others[0]} is {written.get(others[0])} and not {real.get(others[0])}"
        return
    staying = {name for name in real if stays_float32(policy.network, name)}
    if staying != {name for name in real if has_part(name, planned.network.float32)}:
        yield f"plan: float32 is not what stays so, which {min(staying, default='nothing')} does"
    names = {id(parameter): name for name, parameter in policy.network.named_parameters()}
    blocks = [{names[id(p)] for p in block.parameters()} for block in module.blocks(policy.network)]
    every = (planned.network, *planned.network.others)
    if blocks != [set(unit.weights) for network in every for unit in network.blocks]:
        yield "blocks: not the plan's blocks, all of them in the same order"
    missing = [
        name for name in (*Policy.__annotations__, *vars(Policy)) if not name.startswith("_")
    ]
    missing = [name for name in missing if name != "share_sequence" and not hasattr(policy, name)]
    if missing:
        yield f"load: its policy has no {missing[0]}"  # share_sequence is set on loading


def sharing(module: ModuleType, settings: Mapping[str, Any]) -> Iterator[str]:
    """Where `share_sequence` puts nothing in, or what it puts in cannot be suspended."""
    if not hasattr(module, "share_sequence"):
        return
    network: nn.Module = without_weights(module, settings).network
    if module.plan(settings).network.heads != heads_of(network):
        yield "plan: not the network's number of heads"
    before = processors(network)
    layout = Layout(sp=group(2))
    module.share_sequence(network, layout)
    shared = processors(network)
    hooked = any(part._forward_hooks for part in network.modules())
    if not hooked or all(one is other for one, other in zip(before, shared, strict=True)):
        yield "share_sequence: puts in no hooks, or no processors"
    with layout.suspended():
        if any(one is not other for one, other in zip(before, processors(network), strict=True)):
            yield "share_sequence: a processor that the layout does not know, so that it cannot be suspended"
    if any(one is not other for one, other in zip(shared, processors(network), strict=True)):
        yield "share_sequence: a processor that does not come back"


def processors(network: nn.Module) -> list[Any]:
    return [part.processor for part in network.modules() if hasattr(part, "processor")]


def group(size: int) -> Group:
    """The first of so many ranks that share sequences, of which nothing is sent."""
    return Group(None, 0, size)  # type: ignore[arg-type]


# --- the families
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.known())
def test_a_family_keeps_the_contract(name: str) -> None:
    module: Any = models.family(name)
    assert contract(module) == []


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("hunyuan_video", {"guidance_embeds": False}),
        (
            "stable_diffusion",
            {
                "use_linear_projection": True,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
            },
        ),
    ],
)
def test_other_configs_have_their_classs_shapes(name: str, changed: dict[str, Any]) -> None:
    module: Any = models.family(name)
    assert list(shapes(module, shortened(module.PUBLISHED[-1][1]) | changed)) == []


@pytest.mark.parametrize("name", models.known())
def test_sequences_are_shared_or_refused(name: str) -> None:
    module: Any = models.family(name)
    policy = without_weights(module, shortened(module.PUBLISHED[-1][1]))
    policies.configure(policy, Model(family=name, path="any"))
    sharing_families = models.with_function("share_sequence")
    if name in sharing_families:
        assert policy.share_sequence is module.share_sequence
        install(policy.network, group(2), policy.share_sequence)
        return
    message = (
        f"distributed.sp=2: a {type(policy.network).__name__} has no sequence parallelism; use 1. "
        "Those with it: "
        f"{', '.join(sharing_families)}."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        install(policy.network, group(2), policy.share_sequence)


def test_the_registry_needs_no_torch() -> None:
    script = (
        "import sys; from fastgrpo import models\n"
        "for name in models.known():\n"
        "    models.declared(name, 'NETWORK'), models.declared(name, 'PIPELINE', None), "
        "models.length_limits(name)\n"
        "models.pipelines(), models.with_function('share_sequence')\n"
        "sys.exit([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules] "
        "or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


OF_THE_PAPER = {
    Path("fastgrpo/tools/evaluate/benchmark/protocols.py"),
    Path("fastgrpo/tools/evaluate/reproduce/dry_run.py"),
}
"""Each of the paper's tables is about a model, which its protocol and settings must name."""


def test_no_other_file_knows_a_family_by_name() -> None:
    """In code: a text that is a family's name, or an import of its file."""
    known = set(models.known())
    found = []
    for file in files(".py"):
        product = file.parts[0] in ("fastgrpo", "models", "rewards", "data")
        if not product or file.parent == Path("models") or file in OF_THE_PAPER:
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            told = isinstance(node, ast.Constant) and node.value in known
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            taken = (
                {name.name for name in node.names} if isinstance(node, ast.ImportFrom) else set()
            )
            asked = module.removeprefix("fastgrpo.models.") in known or (
                module == "fastgrpo.models" and taken & known
            )
            if told or asked:
                found.append(f"{file}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found


# --- faulty and new files
# -----------------------------------------------------------------------------------------

FAULTS = {
    "no pipelines": (
        'PIPELINES = ("WanPipeline",)',
        "PIPELINES = ()",
        "PIPELINES: not a tuple of at least one",
    ),
    "no encoder": ("def encoder(", "def text_encoder(", "encoder: missing"),
    "another parameter": (
        "def load(settings: Model, device: torch.device) -> Wan:",
        "def load(settings: Model, device: torch.device, images: bool = False) -> Wan:",
        r"load: its parameters are not \(settings, device\)",
    ),
    "a constant out of sight": (
        "TILED_ABOVE = 1280",
        "if PARTS:\n    MAX_TEXT_TOKENS = 226\nTILED_ABOVE = 1280",
        "MAX_TEXT_TOKENS: declared is not what an import gives",
    ),
    "a plan with torch": (
        'config["out_channels"] * math.prod(kernel)',
        'config["out_channels"] * torch.Size(kernel).numel()',
        "plan: reading it imports ",
    ),
    "no published network for any name": (
        '("", LARGE),',
        '("14b", LARGE),',
        'PUBLISHED: its last part .* is not ""',
    ),
    "a forgotten weight": (
        '        unit.norm(f"{attention}.norm_k", width)\n',
        "",
        r"plan: blocks.0.attn1.norm_k.weight is None and not \(\d+,\)",
    ),
    "a forgotten block": (
        "[*network.blocks]",
        "[*network.blocks][1:]",
        "blocks: not the plan's blocks",
    ),
    "processors that are not noted": (
        "layout.process(block.attn1, SharedAttention)",
        "block.attn1.set_processor(SharedAttention(layout, block.attn1.processor))",
        "share_sequence: a processor that the layout does not know",
    ),
    "another number of heads": (
        "heads=heads, rotary=head",
        "heads=1, rotary=head",
        "plan: not the network's number of heads",
    ),
}
"""In models/wan.py: what is written, what is planted in its place, and what the contract says of
that.
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_names_a_fault(fault: str, tmp_path: Path) -> None:
    written, planted, message = FAULTS[fault]
    text = (models.FOLDER / "wan.py").read_text(encoding="utf-8")
    assert text.count(written) >= 1
    file = tmp_path / "planted.py"
    file.write_text(text.replace(written, planted), encoding="utf-8")
    found = contract(imported(file))
    assert found and all(re.match(message, line) for line in found)


def imported(file: Path) -> ModuleType:
    """A family's file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_family", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_file_is_a_new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy under another name has a plan, and may share sequences, without a change to any other
    file.
    """
    for file in models.FOLDER.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "flux_9.py").write_text(
        (models.FOLDER / "flux.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    recipe = ROOT / "launch" / "t2i_flux.toml"
    machine = Machine(gpu("h800"), Achieved())
    expected = planner.plan(config.load(recipe, ["distributed.sp=2"]), 8, machine)
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    assert "flux_9" in models.known() and "flux_9" in models.pipelines()
    found = planner.plan(
        config.load(recipe, ["model.family=flux_9", "distributed.sp=2"]), 8, machine
    )
    assert [vars(phase) for phase in found.phases] == [vars(phase) for phase in expected.phases]
    with pytest.raises(
        UserError,
        match=r"model.family='flux_10': no file models/flux_10.py. Did you mean flux_9. Use one of .*flux_9",
    ):
        models.family("flux_10")
