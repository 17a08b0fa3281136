"""The cache of conditions: killed and resumed, shared over ranks, refused when it is of something
else.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core import files as core_files
from fastgrpo.core.config import Model, Recipe, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text, take_lock
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import open_world
from fastgrpo.training.conditions import encode as encoding
from fastgrpo.training.conditions.cache import PART, Conditions
from tests.harness import forks, runs, tiny

MANY = 6 * PART - 5
FEW = 2 * PART + 9


def prompt_file(folder: Path, count: int) -> Path:
    file = folder / f"prompts_{count}.txt"
    file.write_text("".join(f"a red circle moves left slowly, take {n}\n" for n in range(count)))
    return file


def recipe(folder: Path, prompts: Path, *overrides: str) -> Recipe:
    return config.load(runs.RECIPE, arguments(folder, prompts, *overrides))


def arguments(folder: Path, prompts: Path, *overrides: str) -> list[str]:
    return [f"run.dir={folder}", f"prompts.train={prompts}", "prompts.heldout=none", *overrides]


def encode(settings: Recipe) -> encoding.Encoded:
    """In this process, as a world of one rank."""
    with open_world() as world:
        return encoding.encode(settings, world, encoding.read_prompts(settings, world))


def complaint(settings: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        encode(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    """The cache's tensors by file."""
    return {
        file.name: file.read_bytes()
        for file in sorted((folder / "embeddings").glob("*.safetensors"))
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    found = (folder / "embeddings").glob("*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in found}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose cache one rank has made undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    encode(recipe(folder, prompt_file(folder, MANY)))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    """A recipe with its cache made, of a model folder that a test may change."""
    model = tmp_path / "model"
    shutil.copytree(tiny.FOLDER, model)
    settings = recipe(tmp_path / "run", prompt_file(tmp_path, 30), f"model.path={model}")
    encode(settings)
    return settings


def test_killed_half_way_it_resumes_and_two_ranks_make_what_one_makes(
    calm: Path, tmp_path: Path
) -> None:
    command = ["embed", str(runs.RECIPE), *arguments(tmp_path, calm / f"prompts_{MANY}.txt")]
    process = forks.start("fastgrpo.cli", command, ranks=2)
    deadline = time.monotonic() + runs.LIMIT
    while len(stamps(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    finished = stamps(tmp_path)
    assert 2 <= len(finished) < len(files(calm)), "killed too early or too late"
    assert forks.start("fastgrpo.cli", command, ranks=2).wait(runs.LIMIT) == 0
    assert files(tmp_path) == files(calm)
    assert {name: stamps(tmp_path)[name] for name in finished} == finished, (
        "finished parts are kept"
    )


def test_conditions_are_those_of_the_encoder_in_order(calm: Path) -> None:
    settings = recipe(calm, calm / f"prompts_{MANY}.txt")
    encoded = encode(settings)
    prompts = [*encoded.train, *encoded.heldout]
    assert len(encoded.conditions) == len(prompts) == MANY
    with policies.encoder(settings.model, settings.video, torch.device("cpu")) as encoder:
        for index in (0, PART - 1, PART, MANY - 1):
            (expected,) = encoder([prompts[index]])
            for name, tensor in expected.items():
                torch.testing.assert_close(encoded.conditions[index][name], tensor)
    assert [len(part) for part in (encoded.conditions[3:5], encoded.conditions[-2:])] == [2, 2]


@pytest.mark.parametrize(("way", "ranks"), [("sharded", 2), ("streamed", 0)])
def test_encoders_that_do_not_fit_make_the_same_cache(way: str, ranks: int, tmp_path: Path) -> None:
    """Three parts of two ranks, the last of nine prompts: they have unlike numbers of forwards."""
    prompts = prompt_file(tmp_path, FEW)
    guided = ("model.cfg=3.0", "model.negative_prompt=blurry")  # of the main rank alone
    encode(recipe(tmp_path / "whole", prompts, *guided))
    overrides = arguments(tmp_path / way, prompts, *guided, f"model.text_encoders={way}")
    done = forks.run("fastgrpo.cli", ["embed", str(runs.RECIPE), *overrides], ranks=ranks)
    assert done.returncode == 0, done.stderr
    for part in ("text_encoder", "text_encoder_2"):
        assert f"{part} encodes " in done.stdout
    assert files(tmp_path / way) == files(tmp_path / "whole")


def test_a_part_is_read_only_when_it_is_asked_for(calm: Path, tmp_path: Path) -> None:
    shutil.copytree(calm, tmp_path / "run")
    conditions = encode(recipe(tmp_path / "run", calm / f"prompts_{MANY}.txt")).conditions
    (tmp_path / "run" / "embeddings" / "part-00001.safetensors").unlink()
    assert conditions[0]["text"].shape[-1] == conditions[2 * PART]["text"].shape[-1]
    with pytest.raises(
        UserError,
        match=r"part-00001\.safetensors cannot be read .*; remove that file and start again",
    ):
        conditions[PART]


def test_a_damaged_part_alone_is_made_again(calm: Path, tmp_path: Path) -> None:
    shutil.copytree(calm, tmp_path / "run")
    part = tmp_path / "run" / "embeddings" / "part-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    part.with_name("part-00003.safetensors.partial").write_bytes(b"half")
    before = stamps(tmp_path / "run")
    encode(recipe(tmp_path / "run", calm / f"prompts_{MANY}.txt"))
    after = stamps(tmp_path / "run")
    assert {name for name in after if after[name] != before[name]} == {part.name}
    assert files(tmp_path / "run") == files(calm)


def one_bit(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)


def shifted_by_one_prompt(part: Path) -> None:
    with safe_open(part, framework="pt") as stored:
        about, names = stored.metadata(), list(stored.keys())
        first = min(int(name.partition(".")[0]) for name in names)
        count = len({name.partition(".")[0] for name in names})
        moved = {}
        for name in names:
            index, _, rest = name.partition(".")
            moved[f"{first + (int(index) + 1 - first) % count}.{rest}"] = stored.get_tensor(name)
    part.write_bytes(safetensors.torch.save(moved, about))


def another_part(part: Path) -> None:
    for ending in (".safetensors", ".sha256"):
        shutil.copyfile(part.with_name(f"part-00001{ending}"), part.with_suffix(ending))


def no_hash(part: Path) -> None:
    part.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [one_bit, shifted_by_one_prompt, another_part, no_hash])
def test_a_part_that_is_not_what_was_written_is_made_anew_and_told(
    damage: Callable[[Path], None], calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(calm, tmp_path / "run")
    folder = tmp_path / "run" / "embeddings"
    damage(folder / "part-00002.safetensors")
    encode(recipe(tmp_path / "run", calm / f"prompts_{MANY}.txt"))
    assert (
        f"prompts.cache={folder}: part-00002.safetensors: not what was written for these prompts, "
        "made anew" in capsys.readouterr().out
    )
    assert files(tmp_path / "run") == files(calm)
    checked = subprocess.run(["sha256sum", "--check", *sorted(folder.glob("*.sha256"))], cwd=folder)
    assert checked.returncode == 0


def test_a_full_disk_is_one_line_and_leaves_only_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tmp_path / "run", prompt_file(tmp_path, FEW))
    synced: list[list[str]] = []

    def fsync(descriptor: int) -> None:
        synced.append(sorted(files(tmp_path / "run")))
        if len(synced) == 5:  # the manifest, a part's hash and a part, and now the second part
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "no space left on the disk" in complaint(settings)
    first = ["part-00000.safetensors"]
    assert synced == [[], [], [], first, first], "a part has its name before it is whole"
    assert {file.name for file in (tmp_path / "run" / "embeddings").iterdir()} == {
        "part-00000.safetensors",
        "part-00000.sha256",
        "part-00001.sha256",
        "part-00001.passes.partial",  # what CLIP found, which the next start removes
        "part-00002.passes.partial",
        "manifest.json",
        "hashes.json",
        "lock",
    }
    assert len(encode(settings).conditions) == FEW


def test_a_cache_of_something_else_is_refused_by_name(
    small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = Path(small.model.path), small.run.dir
    before = stamps(folder)

    def refusal(*overrides: str) -> str:
        prompts = next(
            (o.partition("=")[2] for o in overrides if o.startswith("prompts.train")),
            small.prompts.train,
        )
        line = complaint(recipe(folder, Path(prompts), f"model.path={model}", *overrides))
        start = (
            f"prompts.cache={folder / 'embeddings'}: its conditions differ from this recipe's in "
        )
        end = "; remove that folder, or set prompts.cache to another."
        assert line.startswith(start) and line.endswith(end), line
        return line.removeprefix(start).removesuffix(end)

    assert refusal(f"prompts.train={prompt_file(folder, 31)}") == "prompts"
    assert refusal("prompts.heldout_share=0.5") == "prompts", "another order"
    assert refusal("model.dtype=bfloat16") == "dtype"
    assert refusal("model.cfg=3.0", "model.negative_prompt=blurry") == "negative prompt"
    with monkeypatch.context() as patch:
        patch.setattr("fastgrpo.models.length_limits", lambda family: {"MAX_TEXT_TOKENS": 128})
        assert refusal() == "length limits"
    for part in ("tokenizer_2", "text_encoder"):
        file = max((model / part).iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert refusal() == part
        file.write_bytes(content)
    manifest = folder / "embeddings" / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps(told | {"fingerprint": told["fingerprint"] | {"family": "flux"}})
    )
    assert refusal() == "family"
    manifest.write_text(json.dumps(told | {"format": 0}))
    assert refusal() == "format 0 (of another version of fastgrpo)"
    manifest.write_text("{")
    assert "its manifest.json is damaged; remove that folder" in complaint(small)
    assert stamps(folder) == before


def test_the_same_model_elsewhere_and_later_is_the_same(small: Recipe, tmp_path: Path) -> None:
    """Files count by content: neither their place nor their time matters.

    What encodes nothing does not count.
    """
    shutil.copytree(small.model.path, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (tmp_path / "elsewhere" / "transformer" / "config.json").write_text("{}")
    (tmp_path / "elsewhere" / "text_encoder" / "README.md").write_text("another")
    before = stamps(small.run.dir)
    encode(recipe(small.run.dir, Path(small.prompts.train), f"model.path={tmp_path / 'elsewhere'}"))
    assert stamps(small.run.dir) == before


def test_runs_share_a_cache_and_its_one_negative(tmp_path: Path) -> None:
    overrides = [
        "model.cfg=3.0",
        "model.negative_prompt=blurry",
        f"prompts.cache={tmp_path / 'shared'}",
    ]
    prompts = prompt_file(tmp_path, 20)
    one, two = (
        recipe(tmp_path / name, prompts, *overrides, "model.dtype=bfloat16")
        for name in ("one", "two")
    )
    first, second = encode(one).conditions, encode(two).conditions
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    assert first.negative is not None and second.negative is not None
    with policies.encoder(one.model, one.video, tiny.device()) as encoder:
        for name, tensor in encoder.negative("blurry").items():
            assert first.negative[name].dtype == torch.bfloat16, "stored in the network's precision"
            assert torch.equal(first.negative[name].float(), tensor.cpu()), "which loses nothing"
            assert torch.equal(first.negative[name], second.negative[name])
    (tmp_path / "shared" / "negative.safetensors").unlink()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("part-*")}
    assert encode(one).conditions.negative is not None
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("part-*")
    }


LONGEST = 9  # words of a prompt that Picky sees


class Picky:
    """An encoder that cannot take some prompts.

    A condition is a function of the text, so that order shows.
    """

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        for prompt in prompts:
            if "corrupt" in prompt.text:
                raise UserError(f"image={prompt.image}: cannot be decoded; replace it.")
        return [
            {"text": self.code(prompt.text), "length": torch.tensor(len(prompt.text))}
            for prompt in prompts
        ]

    @staticmethod
    def code(text: str) -> torch.Tensor:
        return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.float32)

    def negative(self, text: str) -> Condition:
        return self([Prompt(text)])[0]

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        count = len(text.split())
        return {"text_encoder": (LONGEST, count)} if count > LONGEST else {}


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(settings: Model, video: Video, device: torch.device) -> Iterator[Picky]:
        yield Picky()

    monkeypatch.setattr(policies, "encoder", opened)


def test_prompts_that_cannot_be_encoded_are_named_or_skipped(
    picky: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"clip {n} {'corrupt' if n % 50 == 7 else 'fine'}" for n in range(FEW)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    settings = recipe(tmp_path / "run", tmp_path / "p.txt")
    first = (
        f"prompts.train={tmp_path / 'p.txt'}: line 8: image=None: cannot be decoded; replace it."
    )
    assert complaint(settings) == f"{first} Or set prompts.bad_rows=skip."
    encoded = encode(recipe(tmp_path / "run", tmp_path / "p.txt", "prompts.bad_rows=skip"))
    kept = [*encoded.train, *encoded.heldout]
    assert {prompt.text for prompt in kept} == {line for line in lines if "fine" in line}
    assert len(encoded.conditions) == len(kept)
    for prompt, condition in zip(kept, encoded.conditions, strict=True):
        assert torch.equal(condition["text"], Picky.code(prompt.text))
        assert condition["length"].dtype == torch.int64
    assert (
        f"prompts: 3 more left out that cannot be encoded (such as {first})"
        in capsys.readouterr().out
    )
    assert complaint(settings) == f"{first} Or set prompts.bad_rows=skip.", (
        "from the finished cache, too"
    )
    (tmp_path / "q.txt").write_text("\n".join(f"corrupt {n}" for n in range(2 * PART)))
    assert "cannot be decoded" in complaint(
        recipe(tmp_path / "q", tmp_path / "q.txt", "prompts.bad_rows=skip")
    )


def test_prompts_that_an_encoder_cuts_are_told_listed_or_refused(
    picky: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [n for n in range(FEW) if n % 50 == 7]
    lines = [f"clip {n} {'very ' * 9 if n in long else ''}fine" for n in range(FEW)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    share = "prompts.heldout_share=0.05"
    settings = recipe(tmp_path / "run", tmp_path / "p.txt", share)
    encoded = encode(settings)
    order = [prompt.text for prompt in (*encoded.train, *encoded.heldout)]
    first = next(text for text in order if "very" in text)
    place = f"prompts.train={tmp_path / 'p.txt'}: line {lines.index(first) + 1}"
    assert (
        "prompts: 3 are longer than an encoder sees (text_encoder cuts 3), such as "
        f"{place}: text_encoder sees 9 of its 12 tokens; all are named in "
        f"{tmp_path / 'run' / 'embeddings' / 'cut.json'}\n"
    ) in capsys.readouterr().out
    listed = json.loads((tmp_path / "run" / "embeddings" / "cut.json").read_text())["cut"]
    assert sorted(entry["prompt"] for entry in listed) == sorted(lines[n] for n in long)
    assert all(entry["tokens_seen"] == {"text_encoder": [9, 12]} for entry in listed)
    encode(settings)
    assert "prompts: 3 are longer" in capsys.readouterr().out, "from the finished cache, too"
    for folder in ("run", "other"):  # with the finished cache and without one
        refusing = (tmp_path / folder, tmp_path / "p.txt", share, "prompts.too_long=refuse")
        assert complaint(recipe(*refusing)) == (
            f"{place}: text_encoder sees 9 of its 12 tokens; shorten it, or set "
            "prompts.too_long=cut. Or set prompts.bad_rows=skip."
        )
        capsys.readouterr()
        kept = encode(recipe(*refusing, "prompts.bad_rows=skip"))
        texts = [prompt.text for prompt in (*kept.train, *kept.heldout)]
        assert texts == [text for text in order if "very" not in text]
        for text, condition in zip(texts, kept.conditions, strict=True):
            assert torch.equal(condition["text"], Picky.code(text))
        assert "prompts: 3 more left out that cannot be encoded" in capsys.readouterr().out


def test_a_negative_prompt_that_is_cut_is_told_or_refused(
    picky: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("model.cfg=2.0", f"model.negative_prompt={'blurry ' * 11}")
    prompts = prompt_file(tmp_path, 40)
    encode(recipe(tmp_path / "run", prompts, *options))
    told = "text_encoder sees 9 of its 11 tokens"
    assert f"model.negative_prompt is cut: {told}\n" in capsys.readouterr().out
    refusing = recipe(tmp_path / "run", prompts, *options, "prompts.too_long=refuse")
    assert complaint(refusing) == (
        f"model.negative_prompt: {told}; shorten it, or set prompts.too_long=cut."
    )


def test_reference_images_and_the_video_size_count_where_there_are_some(
    picky: None, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(bytes(200_000))
    rows = [json.dumps({"prompt": f"clip {n}", "image": "a.png"}) for n in range(40)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    column = "prompts.image_column=image"
    encode(recipe(tmp_path / "run", tmp_path / "p.jsonl", column))
    told = json.loads((tmp_path / "run" / "embeddings" / "manifest.json").read_text())[
        "fingerprint"
    ]
    assert {"vae", "reference images", "video size"} <= told.keys()
    assert "in video size;" in complaint(
        recipe(tmp_path / "run", tmp_path / "p.jsonl", column, "video.height=64")
    )
    (tmp_path / "a.png").write_bytes(bytes(199_999) + b"x")
    assert "in reference images;" in complaint(
        recipe(tmp_path / "run", tmp_path / "p.jsonl", column)
    )


def test_the_command_encodes_and_says_how_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = prompt_file(tmp_path, FEW)
    assert cli.main(["embed", str(runs.RECIPE), *arguments(tmp_path / "run", prompts)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"encoding prompts: 64 of {FEW}, about ",
        f"{FEW} prompts encoded in ",
        "held out",
    ):
        assert part in out
    assert f"the conditions of {FEW} prompts are in {tmp_path / 'run' / 'embeddings'}" in out
    other = prompt_file(tmp_path, FEW - 1)
    assert cli.main(["embed", str(runs.RECIPE), *arguments(tmp_path / "run", other)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgrpo: prompts.cache=") and err.count("\n") == 1


def looking_often(rank: int) -> None:
    """And with no patience for anything else."""
    encoding.LOOK_EVERY_S, core_files.PATIENCE_S = 0.05, 0.0


def test_what_another_process_is_encoding_is_waited_for(calm: Path, tmp_path: Path) -> None:
    """By two ranks; once the other one is gone, without having made anything, they make it."""
    command, out = (
        ["embed", str(runs.RECIPE), *arguments(tmp_path, calm / f"prompts_{MANY}.txt")],
        tmp_path / "out",
    )
    waits = f"prompts.cache={tmp_path / 'embeddings'}: another process is encoding there; waiting until it ends\n"
    lock = take_lock(tmp_path / "embeddings", "prompts.cache")
    assert lock is not None
    with lock:
        process = forks.start("fastgrpo.cli", command, ranks=2, output=out, first=looking_often)
        deadline = time.monotonic() + runs.LIMIT
        while not (out.exists() and waits in out.read_text()) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1.0)  # many looks
        assert process.poll() is None and not files(tmp_path)
    assert process.wait(runs.LIMIT) == 0
    assert files(tmp_path) == files(calm) and out.read_text().count(waits) == 1


def test_what_another_process_has_completed_is_taken(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it still holds the lock."""
    folder = tmp_path / "run" / "embeddings"

    def complete(_: float) -> None:
        assert not folder.joinpath("manifest.json").exists(), (
            "it was complete at the last look already"
        )
        shutil.copytree(
            calm / "embeddings", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock")
        )

    monkeypatch.setattr(time, "sleep", complete)
    lock = take_lock(folder, "prompts.cache")
    assert lock is not None
    with lock:
        assert (
            len(encode(recipe(tmp_path / "run", calm / f"prompts_{MANY}.txt")).conditions) == MANY
        )
    told = capsys.readouterr().out
    assert "waiting until it ends" in told and "prompts encoded" not in told
    after = take_lock(folder, "prompts.cache")
    assert after is not None, "nothing is held once it is there"
    after.close()


def test_of_two_that_replace_a_file_at_once_both_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two runs with the hashes of one cache, which they keep before either holds its lock."""
    rename, file = os.replace, tmp_path / "hashes.json"

    def late(partial: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", rename)
        replace_text(target, "the second's")
        rename(partial, target)

    monkeypatch.setattr(os, "replace", late)
    replace_text(file, "the first's")
    assert file.read_text() == "the first's" and list(tmp_path.iterdir()) == [file]


def test_conditions_are_a_sequence(calm: Path) -> None:
    conditions = encode(recipe(calm, calm / f"prompts_{MANY}.txt")).conditions
    assert isinstance(conditions, Conditions) and conditions.negative is None
    with pytest.raises(IndexError):
        conditions[MANY]
