"""The contract of every reward in the folder, whatever its name: a reward that breaks it is named
with the rule. A reward with weights is tried with tiny random ones.
"""

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastgrpo.rewards
from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.networks.geneval.rules import Found
from fastgrpo.rewards.networks.ocr import engine
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.tools.check import reward_contract
from fastgrpo.tools.check.reward_contract import RULES, Tried, contract
from tests.harness import endpoint, servers
from tests.harness.damaged_requests import damaged, fitting
from tests.harness.weights import clip
from tests.harness.weights import hpsv3 as hpsv3_folder
from tests.harness.weights import videoalign as videoalign_folder


def broken(spec: RewardSpec) -> list[str]:
    """What a reward breaks, each line beginning with the rule's name; empty for a good one."""
    rules, tried = None, None
    if spec.name in CLIPS:  # whose planted engine reads no golden clip
        rules, tried = [*(RULES.keys() - {"server", "golden"})], Tried(*CLIPS[spec.name]())
    found = contract(spec, rules, tried)
    return [f"{rule}: {line}" for rule, lines in found.items() for line in lines]


def with_weights(name: str, write: Callable[[Path], object]) -> Callable[[Path], RewardSpec]:
    """A CLIP's tiny folder and the spec that names it."""

    def make(folder: Path) -> RewardSpec:
        write(folder)
        return RewardSpec(name=name, weights={}, path=str(folder), device="cpu")

    return make


def videoalign(folder: Path) -> RewardSpec:
    videoalign_folder.write(folder)
    return videoalign_folder.spec(folder)


def hpsv3(folder: Path) -> RewardSpec:
    hpsv3_folder.write(folder)
    return hpsv3_folder.spec(folder)


def geneval(folder: Path) -> RewardSpec:
    """Rows that ask for three benches under each caption; the planted detector reads no weights."""
    (folder / "clip").mkdir(parents=True)
    clip.write_transformers(folder / "clip")
    for name in ("config.json", "model.safetensors", "detector.pth"):
        (folder / name).touch()
    entry = {"class": "bench", "count": 3}
    rows = [{"tag": "counting", "include": [entry], "prompt": p} for p in servers.CAPTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hf = folder.name == "geneval_hf"
    return RewardSpec(
        name=folder.name,
        weights={},
        path=str(folder if hf else folder / "detector.pth"),
        device="cpu",
        options={"rows": str(folder / "rows.jsonl"), "clip": str(folder / "clip")},
    )


class Benches(nn.Module):
    """A detector that finds as many benches as the bytes of a picture say, in place of one that
    takes minutes for so many pictures.
    """

    def forward(self, pictures: Tensor) -> list[list[Found]]:
        bench = Found("bench", 0.95, (0, 0, 1, 1), torch.ones(32, 32, dtype=torch.bool))
        return [[bench] * (int(picture.sum()) % 4) for picture in pictures]


def plant_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reader in (("geneval", "of_openmmlab"), ("geneval_hf", "of_transformers")):
        module = importlib.import_module(f"fastgrpo.rewards.{name}")
        monkeypatch.setattr(module, reader, lambda path: Benches())


def vlm_judge(folder: Path) -> RewardSpec:
    options = {
        "endpoints": endpoint.shared(),
        "model": endpoint.MODEL,
        "question": "Is {prompt} bright?",
    }
    return RewardSpec(name="vlm_judge", weights={}, frames=2, options=options)


def checklist(folder: Path) -> RewardSpec:
    folder.mkdir()
    spec = vlm_judge(folder)
    (folder / "questions").write_text("Is {prompt} bright?\nIs it not dark?\n")
    (folder / "weights").write_text("[1.0, 0.5]")
    files = {key: str(folder / key) for key in ("questions", "weights")}
    options = {key: value for key, value in spec.options.items() if key != "question"}
    options |= {"questions": files["questions"], "question_weights": files["weights"]}
    return spec.model_copy(update={"name": "checklist", "options": options})


def vision_reward(folder: Path) -> RewardSpec:
    """Answers of the clips that are tried; others, such as shorter ones, have no score."""
    folder.mkdir()
    rows = [
        {
            "pixels": sha256(clip.numpy().tobytes()).hexdigest(),
            "prompt": prompt,
            "yes": [p / 6] * 29,
        }
        for p, (clip, prompt) in enumerate(zip(servers.clips(), servers.CAPTIONS, strict=True), 1)
    ]
    (folder / "scores").write_text("\n".join(map(json.dumps, rows)))
    (folder / "weights").write_text(json.dumps([0.1] * 29))
    options = {
        "scores": str(folder / "scores"),
        "question_weights": str(folder / "weights"),
        "weights_sha256": sha256((folder / "weights").read_bytes()).hexdigest(),
    }
    return RewardSpec(name="vision_reward", weights={}, options=options)


WEIGHTS: dict[str, Callable[[Path], RewardSpec]] = {
    "hps": with_weights("hps", clip.write_hps),
    "clip_score": with_weights("clip_score", clip.write_open_clip),
    "pick_score": with_weights("pick_score", clip.write_transformers),
    "videoalign": videoalign,
    "hpsv3": hpsv3,
    "geneval": geneval,
    "geneval_hf": geneval,
    "vlm_judge": vlm_judge,
    "checklist": checklist,
    "vision_reward": vision_reward,
}
"""How a reward's tiny weights, or the endpoint that it asks, are made; a reward that needs none
is not here."""


LETTERS = "abcdefgh"


def lettered() -> tuple[Tensor, list[str]]:
    """The tiny world's clips, each with a prompt that asks for LETTERS."""
    return servers.clips(), [f'a sign "{LETTERS}", seen {n} times' for n in range(6)]


def plant_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put in place of RapidOCR, which takes minutes for so many pictures and need not be here, one
    that reads some of LETTERS off it.
    """
    monkeypatch.setattr(engine, "model_files", lambda: (folder / "model", folder / "model"))
    monkeypatch.setattr(engine, "versions", dict)
    monkeypatch.setattr(
        engine, "build", lambda threads: lambda picture: LETTERS[int(picture.sum()) % 7 :]
    )
    (folder / "model").touch()


CLIPS: dict[str, Callable[[], tuple[Tensor, list[str]]]] = {"ocr": lettered}
"""Clips and prompts of a reward that judges no others than its own; else those of the tiny world."""


@pytest.mark.parametrize("name", rewards.known())
def test_every_reward_keeps_the_contract(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_engine(tmp_path, monkeypatch)
    plant_detector(monkeypatch)
    spec = WEIGHTS[name](tmp_path / name) if name in WEIGHTS else rewards.plain(name)
    (tmp_path / name).mkdir(exist_ok=True)
    assert broken(spec) == []
    assert served(spec)


def served(spec: RewardSpec) -> bool:
    """Whether two replicas give a reward's scores, of the frames alone that the reward looks at:
    also after damaged requests, and the second where the first has gone.
    """
    clips, prompts = CLIPS.get(spec.name, lambda: (servers.clips(), servers.CAPTIONS))()
    reward = rewards.load(spec)
    expected = reward_contract.table(reward(clips, prompts, reward_contract.FPS))

    def right(client: RewardClient) -> bool:
        found = client.score(clips, prompts, reward_contract.FPS)[spec.name]
        return reward_contract.close(reward_contract.table(found), expected)

    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        one = first.enter_context(servers.running({spec.name: reward}))
        other = stack.enter_context(servers.running({spec.name: reward}))
        client = stack.enter_context(RewardClient([one, other], servers.TOKEN, [spec.name]))
        client.wait_ready(30.0)
        rng = random.Random(spec.name)
        for _ in range(40):
            body = damaged(rng, [spec.name])
            status, fit = servers.post(one, body).status_code, fitting(body, [spec.name])
            # harmless damage leaves pictures of a few pixels, which a reward may refuse
            assert status == fit or (status, fit) == (422, 200), (status, fit, body[:200])
        before = right(client)
        first.close()
        return before and right(client)


# ---- planted rewards

PLANTED = """
import torch
from fastgrpo.core.reward import Reward, RewardSize, Scores

{top}

class Planted(Reward):
    names = ("A",)

    def frames_used(self, frames, fps):
        return [0]

    def __call__(self, pixels, prompts, fps):
        values = pixels[:, 0].flatten(1).float().mean(1)
        valid = torch.tensor([prompt.strip() != "" for prompt in prompts])
        values[~valid] = float("nan")
        {body}
        return Scores({{"A": values}}, valid)

{end}

def load(spec):
    return Planted()
"""

WITHOUT_BASE = """
class Plain:
    names = ("A",)

def load(spec):
    return Plain()
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> RewardSpec:
    """Make `folder` the folder of rewards, with this one, for one test."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.delitem(sys.modules, f"fastgrpo.rewards.{name}", raising=False)
    monkeypatch.setattr(fastgrpo.rewards, "FOLDER", folder)
    monkeypatch.setattr(fastgrpo.rewards, "__path__", [str(folder), *fastgrpo.rewards.__path__])
    return rewards.plain(name)


SIZE = "SIZE = RewardSize(parameters=1.0, tokens=1.0, frames_scored=lambda spec, frames, fps: {})"


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ({}, None),
        ({"top": SIZE.format(1)}, None),
        (
            {"top": SIZE.format("frames")},
            "frames: a plan counts other frames than the 1 of frames_used",
        ),
        ({"top": "SIZE = 1.0"}, "declaration: SIZE is 1.0, no RewardSize"),
        (
            {"body": "values = values - values.nanmean()"},
            "batches: a clip alone has another score than in a batch",
        ),
        (
            {"body": "values = values + torch.arange(len(values))"},
            "batches: the order of a batch changes scores",
        ),
        (
            {"body": "values[~valid] = -1.0"},
            "odd_prompts: A is a number, not NaN, in a clip without a score",
        ),
        ({"body": "valid[:] = True"}, "odd_prompts: A is not finite in a valid clip"),
        (
            {"body": "values = torch.zeros(len(pixels))"},
            "values: every clip has the same score in every part",
        ),
        ({"body": "values = values.double()"}, "form: A is torch.float64 [6], not float32 [6]"),
        ({"body": "values = values[:, None]"}, "form: A is torch.float32 [6, 1], not float32 [6]"),
        ({"body": "pixels += 1"}, "form: the pixels are changed in place"),
        (
            {"body": "values = values + pixels[:, -1].flatten(1).float().mean(1)"},
            "frames: frames outside frames_used",
        ),
        (
            {"body": "if len(pixels[0]) < 3: raise ValueError"},
            "least_frames: a clip of 1 frames is refused",
        ),
        (
            {"top": "LEAST_FRAMES = 3"},
            "least_frames: a clip of 1 frames is judged, LEAST_FRAMES is 3",
        ),
        ({"end": "Planted.names = ()"}, "form: names is (), no tuple of texts"),
        (
            {"end": "Planted.frames_used = lambda self, frames, fps: [frames]"},
            "frames: frames_used(1, 0.5) is [1]",
        ),
        (
            {"end": "Planted.reads_prompts = False"},
            "unread_prompts: reads_prompts is False, and prompts change scores",
        ),
        ({"end": "Planted.fingerprint = property(id)"}, "declaration: the fingerprint changes"),
    ],
    ids=lambda value: " ".join(value.values())[:40] if isinstance(value, dict) else "",
)
def test_a_planted_fault_is_named(
    fault: dict[str, str], rule: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PLANTED.format(**({"top": "", "body": "", "end": ""} | fault))
    violations = broken(plant(tmp_path, monkeypatch, "planted", text))
    if rule is None:
        assert violations == []
    else:
        assert any(line.startswith(rule) for line in violations), violations


def test_a_reward_without_the_base_class_is_refused_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = plant(tmp_path, monkeypatch, "without_base", WITHOUT_BASE)
    assert rewards.known() == ("without_base",)
    with pytest.raises(
        UserError, match=r"name=without_base: load\(\) returned a Plain, not a Reward; "
    ):
        contract(spec)


def test_the_registry_of_rewards_needs_no_torch() -> None:
    code = (
        "import sys; from fastgrpo import rewards; "
        "[(rewards.least_frames(spec), rewards.declared(spec, 'SIZE', None)) for spec in "
        "map(rewards.plain, rewards.known())]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
