"""Faults that a CPU does not show, put into a module's source when a forked process imports it."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from tests import ROOT


@dataclass(frozen=True)
class Plant:
    """A fault: lines of a file that others take the place of."""

    file: str
    old: str
    new: str
    found: str  # part of the finding that it causes
    overrides: tuple[str, ...] = ()  # keys under which its lines run

    @property
    def module(self) -> str:
        """The dotted name of the file's module."""
        path = self.file if self.file.startswith("fastgrpo/") else f"fastgrpo/{self.file}"
        return path.removesuffix(".py").replace("/", ".")

    def text(self) -> str:
        """The file with the fault in it."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.file}: the lines of a plant are not there once"
        return source.replace(self.old, self.new)


MEAN = "    return density.flatten(1).mean(1)\n"
STEP = "        mean, std = sampler.transition(x, v, t=t, t_next=t_next, eta=plan.eta)\n"
PLANTS = {
    "mask_on_host": Plant(
        "fastgrpo/algorithm/transitions.py",
        MEAN,
        "    mask = torch.zeros(density.shape[2:], dtype=torch.bool)\n"
        "    density = density.masked_fill(mask, 0.0)\n" + MEAN,
        "mixed",
    ),
    "item_in_loop": Plant(
        "fastgrpo/training/rollout/sampling.py",
        STEP,
        STEP + "        assert mean.abs().max().item() < 1e9\n",
        "new: sync item, fastgrpo/training/rollout/sampling.py",
    ),
    "host_tensor_in_collective": Plant(
        "fastgrpo/training/update.py",
        "    dist.all_reduce(sums)\n",
        "    sums = sums.cpu()\n    dist.all_reduce(sums)\n",
        "new: collective all_reduce gloo, fastgrpo/training/update.py",
    ),
    "mask_to_network": Plant(
        "models/hunyuan_video.py",
        "mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)",
        "mask = torch.ones(text.shape[:2], dtype=torch.bool)",
        "new: sync copy from the host, models/hunyuan_video.py",
    ),
    "device_tensor_in_gloo": Plant(
        "fastgrpo/run/stopping.py",
        "flags = torch.tensor([self._wanted(), busy], dtype=torch.uint8)",
        "flags = torch.tensor(\n"
        "            [self._wanted(), busy], dtype=torch.uint8, device=self.world.device)",
        "gloo on the GPU",
    ),
    "mixed_in_gather": Plant(
        "fastgrpo/run/rank_times.py",
        "        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]",
        "        everyone = [\n            torch.empty_like(mine, device=self.world.device)\n"
        "            for _ in range(self.world.size)]",
        "mixed all_gather",
    ),
    "no_wait_for_pixels": Plant(
        "fastgrpo/training/scoring/scorer.py",
        "            copied.synchronize()\n",
        "            pass\n",
        "and unplanted has",
    ),
    "no_set_device": Plant(
        "fastgrpo/training/scoring/scorer.py",
        "        torch.cuda.set_device(device)\n",
        "        pass\n",
        "foreign event",
    ),
    "host_generator": Plant(
        "fastgrpo/algorithm/noise.py",
        "generator=generator(key, device), device=device)",
        "generator=generator(key), device=device)",
        "Expected a 'cuda' device type for generator",
    ),
    "not_contiguous": Plant(
        "fastgrpo/parallel/sequence_parallel.py",
        "dist.all_to_all_single(received, rows.contiguous(), take, give, group=group)",
        "dist.all_to_all_single(received, rows, take, give, group=group)",
        "not contiguous",
        ("distributed.sp=2",),
    ),
    "int16_in_nccl": Plant(
        "fastgrpo/tools/preflight/largest_batch.py",
        "agreed = torch.tensor(number, device=world.device)",
        "agreed = torch.tensor(number, device=world.device, dtype=torch.int16)",
        "refused all_reduce of torch.int16",
        ("rollout.batch_size=auto",),
    ),
    "one_rank_destroys": Plant(
        "fastgrpo/parallel/world.py",
        "        yield World(rank=rank, size=size, device=device, mesh=mesh, sp=sp)\n"
        "    except BaseException as error:\n"
        "        if dist.get_world_size() == 1 or _raised_on_all_ranks(error):\n",
        "        if rank == size - 1:\n            raise RuntimeError('planted')\n"
        "        yield World(rank=rank, size=size, device=device, mesh=mesh, sp=sp)\n"
        "    except BaseException:\n"
        "        if True:\n",
        "hang destroy_process_group",
    ),
    "state_pinned_early": Plant(
        "fastgrpo/training/rollout/sampling.py",
        '    return to_host(x) if plan.store == "host" and x.is_cuda else x.clone()',
        '    return to_host(x).clone() if plan.store == "host" and x.is_cuda else x.clone()',
        "red before training: ratio",
        ("rollout.store=host", "run.preflight=true"),
    ),
    "heavy_reward": Plant(
        "rewards/tiny_world.py",
        "    names: tuple[str, ...] = PARTS\n",
        "    names: tuple[str, ...] = PARTS\n"
        "    heavy = torch.nn.Linear(HEAVY, 1024)\n\n"
        "    def modules(self):\n        return (self.heavy,)\n".replace("HEAVY", str(13 * 1024)),
        "the GPU has no room for ",
        ("run.preflight=true",),
    ),
}
"""By name. Thirteen are of the code, of which three are found only by comparison with a golden
list; the last is a recipe for which the memory does not suffice, and which preflight must refuse.
"""


class _Planted(importlib.machinery.SourceFileLoader):
    """Loads a module from its file with the fault in it."""

    def __init__(self, name: str, path: str, plant: Plant) -> None:
        super().__init__(name, path)
        self.plant = plant

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        return compile(self.plant.text(), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module that has a fault."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.plant.module:
            return None
        file = str(ROOT / self.plant.file)
        loader = _Planted(name, file, self.plant)
        return importlib.machinery.ModuleSpec(name, loader, origin=file)


def put_in(name: str) -> None:
    """Have this process import the program anew, with a fault in it."""
    for module in [module for module in sys.modules if module.split(".")[0] == "fastgrpo"]:
        del sys.modules[module]
    sys.meta_path.insert(0, _Finder(PLANTS[name]))
