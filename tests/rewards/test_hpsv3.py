"""HPSv3: equal to the original forward pass, processor and tokenizer; wrong files are one line.

The goldens were printed under transformers 4.45.2 by the reference's forward pass (embeddings alone
handed to the text model, the head in float32), its image processor and the whole text's ids.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards import hpsv3
from fastgrpo.rewards.networks.hpsv3 import network as networks
from fastgrpo.rewards.networks.hpsv3.preprocess import PIXELS, view
from fastgrpo.rewards.networks.hpsv3.prompt import FORM, TEMPLATE
from fastgrpo.rewards.networks.qwen2_vl import template as templates
from fastgrpo.rewards.networks.qwen2_vl.body import Batch, config_of, empty_body
from fastgrpo.rewards.networks.qwen2_vl.patches import frame_size
from tests.harness.weights import hpsv3 as hpsv3_folder
from tests.rewards.test_videoalign import INJECTION, PROMPTS, clips

EXACT = [-2.0455994606018066, -0.8609034419059753, -1.577094554901123]
COARSE = [-2.0455143451690674, -0.8573892116546631, -1.5778480768203735]
"""What the original gave for `clips(3, 1)` and PROMPTS: as it is, and with its rotary tables cast to
bfloat16. A change of tests/harness/weights/hpsv3.py would ask for new numbers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hpsv3")
    hpsv3_folder.write(made)
    return made


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def score(spec: RewardSpec, pixels: Tensor | None = None, prompts: object = PROMPTS) -> Tensor:
    """The scores [B] of some pictures."""
    shown = clips(3, 1) if pixels is None else pixels
    return hpsv3.load(spec)(shown, list(prompts), 8.0).values["HPSv3"]  # type: ignore[call-overload]


# The network


@pytest.mark.parametrize(("coarse", "wanted"), [(False, EXACT), (True, COARSE)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_the_original(
    folder: Path, coarse: bool, wanted: list[float], batch_size: int
) -> None:
    """Three texts of three lengths, padded together or alone."""
    found = score(hpsv3_folder.spec(folder, batch_size, coarse_rotary=coarse))
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-5)


def test_the_positions_of_qwen2_vl_would_give_other_scores(folder: Path) -> None:
    """Transformers 5 gives an image's tokens rows and columns (M-RoPE); HPSv3 was trained
    without.
    """
    reward = hpsv3.load(hpsv3_folder.spec(folder))
    made = [reward._prepare(clips(3, 1)[0, 0], PROMPTS[0])]
    assert made[0] is not None
    ids = torch.tensor([made[0].ids])
    with torch.inference_mode():
        hidden = reward.network.body(
            input_ids=ids,
            pixel_values=made[0].view.patches,
            image_grid_thw=torch.tensor([made[0].view.grid]),
            mm_token_type_ids=(ids == reward.reader.seen_id).int(),
        ).last_hidden_state
        native = reward.network.head(hidden[0, reward.reader.marks(made[0].ids)])[0, 0]
    assert abs(native.item() - EXACT[0]) > 1e-3  # 0.0066
    # and positions that such a call leaves behind reach no later score
    again = reward(clips(3, 1), PROMPTS, 8.0).values["HPSv3"]
    torch.testing.assert_close(again, torch.tensor(EXACT), rtol=0, atol=1e-5)


def test_the_head_stays_in_float32_and_its_first_output_is_the_score(folder: Path) -> None:
    spec = hpsv3_folder.spec(folder, coarse_rotary=True)
    reward = hpsv3.load(spec.model_copy(update={"dtype": "bfloat16"}))
    assert reward.network.body.dtype == torch.bfloat16
    assert {p.dtype for p in reward.network.head.parameters()} == {torch.float32}
    found = reward(clips(3, 1), PROMPTS, 8.0).values["HPSv3"]
    torch.testing.assert_close(found, torch.tensor(COARSE), rtol=0, atol=0.15)
    exact = hpsv3.load(spec)
    with torch.no_grad():
        exact.network.head[5].get_parameter("bias")[1] += 100.0
    found = exact(clips(3, 1), PROMPTS, 8.0).values["HPSv3"]
    torch.testing.assert_close(found, torch.tensor(COARSE), rtol=0, atol=1e-5)


def test_padding_does_not_reach_a_score(folder: Path) -> None:
    reward = hpsv3.load(hpsv3_folder.spec(folder))
    made = reward._prepare(clips(3, 1)[0, 0], PROMPTS[0])
    assert made is not None
    marks = torch.tensor([reward.reader.marks(made.ids)])
    grids = torch.tensor([made.view.grid])
    for filler in ([], [0] * 9, [7] * 40):
        ids = torch.tensor([made.ids + filler])
        found = reward.network(Batch(ids, made.view.patches, grids, marks))
        torch.testing.assert_close(found, torch.tensor(EXACT[:1]), rtol=0, atol=1e-5)


def test_coarse_frequencies_where_the_checkpoint_or_the_run_is_bfloat16(own: Path) -> None:
    def coarse(spec: RewardSpec) -> bool:
        frequencies = hpsv3.load(spec).network.body.language_model.rotary_emb.inv_freq
        return bool(frequencies.equal(frequencies.bfloat16().float()))

    spec = hpsv3_folder.spec(own)
    assert not coarse(spec)
    assert coarse(spec.model_copy(update={"dtype": "bfloat16"}))
    change(own, lambda state: {name: t.bfloat16() for name, t in state.items()})
    assert coarse(spec)
    assert not coarse(hpsv3_folder.spec(own, coarse_rotary=False))


# The pixels


@pytest.mark.parametrize(
    ("height", "width", "size", "tokens"),
    [
        (224, 224, (448, 448), 256),
        (256, 256, (448, 448), 256),
        (480, 480, (448, 448), 256),
        (512, 512, (448, 448), 256),
        (1024, 1024, (448, 448), 256),
        (320, 512, (364, 588), 273),
        (400, 640, (336, 560), 240),
        (480, 832, (336, 588), 252),
        (720, 1280, (336, 588), 252),
        (1080, 1920, (336, 588), 252),
        (1280, 720, (588, 336), 252),
    ],
)
def test_sizes_of_the_reference(
    height: int, width: int, size: tuple[int, int], tokens: int
) -> None:
    assert frame_size(height, width, PIXELS, PIXELS) == size
    seen = view(torch.zeros(height, width, 3, dtype=torch.uint8))
    assert (seen.tokens, seen.grid) == (tokens, (1, size[0] // 14, size[1] // 14))
    assert seen.patches.shape == (4 * tokens, 1176)


# The text


def test_the_suffix_and_the_hash_are_the_official_ones(tmp_path: Path) -> None:
    """The shipped code holds no text, so the official one is put together here of its known end."""
    suffix = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    assert (len(suffix), hashlib.sha256(suffix.encode()).hexdigest()[:8]) == (67, "2471faca")
    file = tmp_path / "data_collator_qwen.py"
    file.write_text(
        f'import torch\nopen({str(tmp_path / "ran")!r}, "w")\nINSTRUCTION = """Look  \n'
        f'{{text_prompt}}"""\nprompt_with_special_token = """{suffix}"""\n'
    )
    text = templates.read(file, TEMPLATE)
    assert text == "Look  \n{text_prompt}" + suffix
    assert not (tmp_path / "ran").exists()  # read and not run
    assert (TEMPLATE.sha256[:8], TEMPLATE.sha256[-5:]) == ("f6ee5747", "7502c")
    with pytest.raises(UserError, match=f"not {TEMPLATE.sha256}"):
        templates.check(text, None, file, TEMPLATE)
    file.write_text('INSTRUCTION = "{text_prompt}"\n')
    with pytest.raises(UserError, match="sets no text prompt_with_special_token"):
        templates.read(file, TEMPLATE)


def test_spaces_at_the_ends_of_lines_are_part_of_the_template(own: Path) -> None:
    """An editor or a port that strips them has another text, which the hash refuses; accepted, it
    scores otherwise.
    """
    stripped = re.sub(r" +\n", "\n", hpsv3_folder.TEMPLATE)
    assert stripped.count(" ") == hpsv3_folder.TEMPLATE.count(" ") - 6  # 1, 2, 1 and 2 of them
    (own / "template.txt").write_bytes(stripped.encode())
    with pytest.raises(UserError, match=r"options\.template=.*its SHA-256 is"):
        hpsv3.load(hpsv3_folder.spec(own))
    accepted = hashlib.sha256(stripped.encode()).hexdigest()
    found = score(hpsv3_folder.spec(own, template_sha256=accepted))
    assert (found - torch.tensor(EXACT)).abs().min() > 1e-3


@pytest.mark.parametrize("prompt", [*PROMPTS, "", " red at", "é 日本語 🎬", "{text_prompt}"])
def test_token_ids_equal_those_of_the_whole_text(folder: Path, prompt: str) -> None:
    reader = hpsv3.load(hpsv3_folder.spec(folder)).reader
    filled = hpsv3_folder.TEMPLATE.replace("{text_prompt}", prompt, 1)
    whole = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * 6 + f"<|vision_end|>{filled}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|Reward|>"])
    assert reader(prompt, 6) == tokenizer.encode(whole, add_special_tokens=False).ids


def test_there_is_exactly_one_reward_token(folder: Path) -> None:
    """The user's own is read as letters, and changes nothing for the picture beside it."""
    reward = hpsv3.load(hpsv3_folder.spec(folder))
    attack = INJECTION.replace("<|VQ_reward|>", "<|Reward|>") + "<|image_pad|>"
    ids = reward.reader(attack, 6)
    assert ids.count(reward.reader.mark_ids[0]) == 1 and ids.count(reward.reader.seen_id) == 6
    found = reward(clips(3, 1), (PROMPTS[0], attack, PROMPTS[2]), 8.0)
    assert found.valid.all()
    wanted = torch.tensor(EXACT)[[0, 2]]
    torch.testing.assert_close(found.values["HPSv3"][[0, 2]], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text_prompt}", "must contain <|Reward|>, each once"),
        ("{text_prompt}<|Reward|><|Reward|>", "must contain <|Reward|>, each once"),
        ("<|Reward|>", "must contain {text_prompt}, once"),
    ],
)
def test_wrong_templates_are_one_line(own: Path, template: str, said: str) -> None:
    (own / "template.txt").write_text(template)
    accepted = hashlib.sha256(template.encode()).hexdigest()
    with pytest.raises(UserError) as caught:
        hpsv3.load(hpsv3_folder.spec(own, template_sha256=accepted))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Frames


@pytest.mark.parametrize("rule", [None, "first", "middle", "all", 2])
def test_a_clip_is_the_mean_of_its_frames(folder: Path, rule: str | int | None) -> None:
    spec = hpsv3_folder.spec(folder, batch_size=3)
    clip, frames = clips(2, 5), {None: [0], "first": [0], "middle": [2], 2: [1, 3]}
    chosen = frames.get(rule, range(5))
    reward = hpsv3.load(RewardSpec.model_validate(spec.model_dump() | {"frames": rule}))
    single = [score(spec, clip[:, i : i + 1], PROMPTS[:2]) for i in chosen]
    found = reward(clip, PROMPTS[:2], 8.0).values["HPSv3"]
    torch.testing.assert_close(found, torch.stack(single).mean(0), rtol=0, atol=1e-5)
    assert reward.frames_used(5, 8.0) == list(chosen)


def test_a_clip_that_cannot_be_judged_has_no_score(folder: Path) -> None:
    reward = hpsv3.load(hpsv3_folder.spec(folder, batch_size=1))
    for bad in ("a red circle " * 400, "half a pair \ud800"):
        found = reward(clips(3, 1), (PROMPTS[0], bad, PROMPTS[2]), 8.0)
        assert found.valid.tolist() == [True, False, True]
        assert found.values["HPSv3"].isnan().tolist() == [False, True, False]


# The weights


def change(folder: Path, make: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "HPSv3.safetensors"
    save_file(make(load_file(file)), file)


def test_the_published_size() -> None:
    """736 tensors and 8,292,152,882 parameters, the language head among them, of which 7.75e9 are
    loaded.
    """
    config = hpsv3_folder.base_config() | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_scaling": None,
    }
    config["vision_config"] = config["vision_config"] | {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
    }
    state = empty_body(config_of(config, 151658)).state_dict()
    head = networks.empty_head(3584).state_dict()
    loaded = sum(tensor.numel() for tensor in (*state.values(), *head.values()))
    assert len(state) + len(head) + 1 == 736
    assert loaded + 151658 * 3584 == 8_292_152_882
    assert hpsv3.SIZE.parameters == pytest.approx(loaded, rel=1e-3)


def test_the_language_head_is_not_needed(own: Path) -> None:
    change(own, lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"})
    torch.testing.assert_close(
        score(hpsv3_folder.spec(own)), torch.tensor(EXACT), rtol=0, atol=1e-5
    )


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda own: (own / "HPSv3.safetensors").unlink(), "has no HPSv3.safetensors"),
        (
            lambda own: (own / "HPSv3.safetensors").write_bytes(b"torn"),
            "damaged, or holds more than tensors",
        ),
        (
            lambda own: change(own, lambda s: {n: t for n, t in s.items() if "norm1" not in n}),
            "lacks visual.blocks.0.norm1.weight",
        ),
        (
            lambda own: change(own, lambda s: {n: t for n, t in s.items() if "rm_head.3" not in n}),
            "lacks rm_head.3.weight",
        ),
        (
            lambda own: change(own, lambda s: s | {"rm_head.5.weight": torch.zeros(1, 16)}),
            "another size of rm_head.5.weight [1, 16] instead of [2, 16]",
        ),
        (
            lambda own: change(
                own, lambda s: s | {"language_model.norm.weight": s["model.norm.weight"].clone()}
            ),
            "holds what HPSv3 has not, language_model.norm.weight",
        ),
        (
            lambda own: change(own, lambda s: {f"model.{n}": t for n, t in s.items()}),
            "lacks model.embed_tokens.weight",
        ),
        (
            lambda own: change(
                own,
                lambda s: s | {"model.embed_tokens.weight": s["model.embed_tokens.weight"][:-1]},
            ),
            "<|Reward|>",
        ),
        (lambda own: (own / "base" / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda own: (own / "base" / "config.json").write_text("{"), "cannot be read"),
    ],
)
def test_wrong_files_are_one_line(own: Path, damage: Damage, said: str) -> None:
    damage(own)
    with pytest.raises(UserError) as caught:
        hpsv3.load(hpsv3_folder.spec(own))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_base_files_are_found_beside_the_weights(own: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(own / "base" / name, own / name)
    spec = hpsv3_folder.spec(own)
    options = {key: value for key, value in spec.options.items() if key != "base"}
    found = score(spec.model_copy(update={"options": options}))
    torch.testing.assert_close(found, torch.tensor(EXACT), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"path": None}, "rewards.path: missing"),
        ({"path": "nowhere.safetensors"}, "rewards.path=nowhere.safetensors: no such file"),
        ({"options": {"template": None}}, "rewards.options.template: missing; name hpsv3/dataset"),
        ({"options": {"template_sha256": None}}, f"not {TEMPLATE.sha256}"),
        (
            {"path": "MizzenAI/HPSv3", "options": {"base": "./nowhere"}},
            "rewards.options.base=./nowhere: no such file or folder",
        ),
        ({"options": {"base": "nowhere"}}, "rewards.options.base=nowhere: no such file or folder"),
        ({"options": {"bse": "x"}}, "did you mean 'base'"),
        ({"device": "gpu"}, "rewards.device=gpu"),
    ],
)
def test_a_check_finds_mistakes_without_reading_weights(
    own: Path, changed: dict[str, dict[str, str | None] | str | None], said: str
) -> None:
    (own / "HPSv3.safetensors").write_bytes(b"not looked at")
    good = hpsv3_folder.spec(own)
    rewards.check_settings(good)
    more = changed.get("options", {})
    assert isinstance(more, dict)
    options = {k: v for k, v in (good.options | more).items() if v is not None}
    with pytest.raises(UserError) as caught:
        rewards.check_settings(good.model_copy(update=changed | {"options": options}))
    assert said in str(caught.value)


def test_the_fingerprint_tells_what_scores(own: Path) -> None:
    spec = hpsv3_folder.spec(own)
    first = hpsv3.load(spec).fingerprint
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    moved = own.rename(own.with_name("moved"))
    assert hpsv3.load(hpsv3_folder.spec(moved)).fingerprint == first
    others = [
        hpsv3_folder.spec(moved, coarse_rotary=True),
        hpsv3_folder.spec(moved).model_copy(update={"frames": "all"}),
        hpsv3_folder.spec(moved).model_copy(update={"dtype": "bfloat16"}),
    ]
    base = moved / "base" / "config.json"
    found = {hpsv3.load(other).fingerprint for other in others}
    base.write_text(json.dumps(json.loads(base.read_text()) | {"rms_norm_eps": 1e-5}))
    found.add(hpsv3.load(hpsv3_folder.spec(moved)).fingerprint)
    change(moved, lambda state: {name: t + 1e-3 for name, t in state.items()})
    found.add(hpsv3.load(hpsv3_folder.spec(moved)).fingerprint)
    assert len(found | {first}) == 6
    assert FORM.marks == ("<|Reward|>",)
