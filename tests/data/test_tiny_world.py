"""The tiny world's command: what it writes is a HunyuanVideo that diffusers loads, the same each
time.
"""

import re
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from transformers import AutoTokenizer

from fastgrpo.core.config import Prompts, paths
from fastgrpo.data import prompts
from fastgrpo.data.tiny_world import make, reference_images, shapes
from fastgrpo.data.tiny_world.text import (
    caption_words,
    crop_start,
    encode,
    encode_pooled,
    llama_tokenizer,
)
from fastgrpo.data.tiny_world.vae import latents_of

FEW = ("--vae-steps", "2", "--clips", "16")
PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world after three steps of training, and beside it a copy as it was after two."""
    made = tmp_path_factory.mktemp("tiny_world") / "model"
    assert make.main([str(made), *FEW, "--steps", "3", "--keep", "2"]) == 0
    return made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> HunyuanVideoPipeline:
    loaded = HunyuanVideoPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_has_the_diffusers_layout_and_names_no_other_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*PARTS, "model_index.json"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text()


def test_shipped_folder_is_complete_and_small(folder: Path) -> None:
    shipped = Path(make.__file__).parents[1].joinpath("tiny_hunyuan_video")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(
        path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()
    )
    assert sum((shipped / file).stat().st_size for file in files) < 12e6
    for part in ("transformer/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"):
        assert (shipped / part).read_bytes() == (folder / part).read_bytes()
    assert_words_are_tokens(shipped)


def test_pipeline_samples_a_clip(pipeline: HunyuanVideoPipeline) -> None:
    prompt = "a red circle moves left slowly"
    clip = pipeline(
        prompt,
        height=32,
        width=32,
        num_frames=shapes.FRAMES,
        num_inference_steps=2,
        output_type="np",
    )
    assert clip.frames.shape == (1, shapes.FRAMES, 32, 32, 3)
    assert np.isfinite(clip.frames).all()


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_steps(
    folder: Path, tmp_path: Path
) -> None:
    again = tmp_path / "model"
    state = torch.get_rng_state()
    assert make.main([str(again), *FEW, "--steps", "2"]) == 0
    # the caller's random numbers go on as if nothing had happened
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(path.relative_to(again) for path in again.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (again / file).read_bytes() == (folder.with_name("model-2") / file).read_bytes(), (
            file
        )
    changed = folder / "transformer" / files[2].name
    assert changed.read_bytes() != (again / "transformer" / files[2].name).read_bytes()


def test_another_seed_gives_other_weights(folder: Path, tmp_path: Path) -> None:
    assert (
        make.main([str(tmp_path / "model"), "--only", "vae", "--vae-steps", "2", "--seed", "1"])
        == 0
    )
    file = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model" / file).read_bytes() != (folder / file).read_bytes()


def test_prompts_encode_as_in_the_pipeline(pipeline: HunyuanVideoPipeline) -> None:
    meaning = shapes.meanings()[0][17]
    for wording in (0, 3):
        prompts = [shapes.caption(meaning, wording), shapes.caption(meaning, wording + 1)]
        text, pooled, mask = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
        length = int(mask[0].sum())
        mine = encode(pipeline.tokenizer, pipeline.text_encoder, prompts)
        assert mine.shape[1] == length == len(prompts[0].split()) + 1
        torch.testing.assert_close(mine, text[:, :length], rtol=1e-4, atol=1e-5)
        own = encode_pooled(pipeline.tokenizer_2, pipeline.text_encoder_2, prompts)
        torch.testing.assert_close(own, pooled, rtol=1e-4, atol=1e-5)
        assert not torch.equal(own[0], own[1])


def test_encode_refuses_prompts_of_different_lengths(pipeline: HunyuanVideoPipeline) -> None:
    with pytest.raises(ValueError, match="lengths in tokens differ"):
        encode(pipeline.tokenizer, pipeline.text_encoder, ["a red circle", "a circle"])


def assert_words_are_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer_2 = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    assert tokenizer.padding_side == "right"
    for word in caption_words():
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids) == [word]
        assert tokenizer_2.convert_ids_to_tokens(tokenizer_2(word).input_ids)[1:-1] == [
            f"{word}</w>"
        ]


def test_every_caption_word_is_one_token(folder: Path) -> None:
    assert_words_are_tokens(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    every = list(shapes.captions(list(chain(*shapes.meanings()))))
    lengths = {text: len(tokenizer(text).input_ids) for text in every}
    assert {
        n for text, n in lengths.items() if text.split()[0] in ("a", "the", *caption_speeds())
    } == {6}
    assert {n for text, n in lengths.items() if text.split()[0] in ("there", "watch", "we")} == {8}


def caption_speeds() -> list[str]:
    return list(chain(*shapes.SPEED_WORDS.values()))


def test_the_template_takes_as_many_tokens_as_with_the_full_model() -> None:
    tokenizer = llama_tokenizer()
    assert crop_start(tokenizer) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    rows = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format("a red circle")).input_ids
    assert tokenizer.unk_token_id not in rows
    assert tokenizer.convert_ids_to_tokens(rows[-4:]) == ["a", "red", "circle", "<|eot_id|>"]


def test_unknown_words_do_not_end_the_prompt_early(pipeline: HunyuanVideoPipeline) -> None:
    ids = pipeline.tokenizer_2("a fluffy dog, 7 µm!").input_ids
    assert ids.count(pipeline.tokenizer_2.eos_token_id) == 1


def test_latents_have_unit_spread(folder: Path) -> None:
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    latents, which = latents_of(vae, 64, np.random.default_rng(5))
    assert latents.shape == (64, 8, 3, 8, 8)
    assert which[:3] == [0, 1, 2]
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)


def test_training_and_held_out_prompts_are_disjoint_and_varied(folder: Path) -> None:
    training, held_out = (
        (folder.parent / f"tiny_world_{name}.txt").read_text().splitlines()
        for name in ("train", "heldout")
    )
    seen, kept = (
        {shapes.parse(text) for text in training},
        {shapes.parse(text) for text in held_out},
    )
    assert None not in seen | kept
    assert not seen & kept
    assert (len(training), len(set(training)), len(seen)) == (1440, 1440, 120)
    assert (len(held_out), len(kept)) == (24, 24)
    sentences = {
        re.sub("|".join([*shapes.COLOURS, *shapes.SHAPES, *shapes.DIRECTIONS]), "_", t)
        for t in held_out
    }
    assert {sentence.split()[0] for sentence in sentences} >= {"a", "the", "there", "watch", "we"}
    assert all(a != b for a, b in pairwise(training))
    # any short prefix has some of everything
    for part in (
        "colour",
        "shape",
        "direction",
        "speed",
    ):
        assert {getattr(shapes.parse(text), part) for text in training[:60]} == {
            getattr(m, part) for m in seen if m
        }


def test_shipped_prompts_are_what_the_command_writes() -> None:
    for name, lines in zip(("train", "heldout"), make.prompts(seed=0), strict=True):
        shipped = Path(make.__file__).parents[1].joinpath(f"tiny_world_{name}.txt")
        assert shipped.read_text().splitlines() == lines


def test_shipped_reference_images_are_what_the_command_writes(tmp_path: Path) -> None:
    """And a prompt tells of the shape and the colour that its picture has."""
    reference_images.write(tmp_path)
    shipped = paths.builtins()["prompts_i2v"]
    assert (tmp_path / shipped.name).read_text() == shipped.read_text()
    split = prompts.split(Prompts(train=str(shipped), image_column="image"))
    assert len(split.train) + len(split.heldout) == 144
    for prompt in (*split.train, *split.heldout):
        picture, meaning = prompt.image, shapes.parse(prompt.text)
        assert isinstance(picture, Path) and meaning is not None
        assert picture.stem == f"{meaning.colour}_{meaning.shape}"
        pixels = np.asarray(Image.open(picture))
        assert (
            pixels == np.asarray(Image.open(tmp_path / picture.parent.name / picture.name))
        ).all()
        assert tuple(pixels[128, 128]) == shapes.COLOURS[meaning.colour]


def test_batches_mix_no_lengths() -> None:
    tokenizer = llama_tokenizer()
    latents = torch.arange(240.0).view(240, 1, 1, 1, 1)
    batches = iter(make.Batches(latents, [i % 120 for i in range(240)], tokenizer, seed=0))
    training, _ = shapes.meanings()
    lengths = set()
    for _ in range(8):
        x_0, said = next(batches)
        assert [shapes.parse(text) for text in said] == [
            training[int(i) % 120] for i in x_0.flatten()
        ]
        (length,) = {len(tokenizer(text).input_ids) for text in said}
        lengths.add(length)
    assert lengths == {6, 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "vea"],
            "--only=vea: no stage 'vea'; use some of prompts,tokenizers,vae,transformer",
        ),
        (["--only", "transformer"], "no tokenizer/ in it; run the stages tokenizers and vae first"),
        (["--steps", "0"], "--steps=0: too small; use 1 or more"),
        (["--keep", "6e2"], "--keep=6e2: not a list of steps; write it as 600,1200"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make.main([str(tmp_path / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1
