"""Prompt files of every kind, what is left out of them, and the held-out split."""

import csv
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from fastgrpo.cli import main as cli
from fastgrpo.core.config import Prompts
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.data import prompts
from tests import ROOT
from tests.harness import runs

# texts that a reader may break: quotes, commas, line ends, other scripts, an emoji
HARD = [
    'a "red" fox, running',
    "two\nlines",
    "  wide   spaces ",
    "ein grüner Kreis",
    "一只猫",
    "🦊 fox",
    "plain",
]
EXPECTED = [
    'a "red" fox, running',
    "two lines",
    "wide spaces",
    "ein grüner Kreis",
    "一只猫",
    "🦊 fox",
    "plain",
]
VIDPROM = [
    "uuid",
    "prompt",
    "time",
    "toxicity",
    "obscene",
    "identity_attack",
    "insult",
    "threat",
    "sexual_explicit",
]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of the kind that its suffix says."""
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".csv":
            with file.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=3)
    return file


def texts(settings: Prompts) -> list[str]:
    return [
        prompt.text
        for prompt in prompts.read(
            settings, settings.train, "prompts.train", settings.limit
        ).prompts
    ]


def complaint(settings: Prompts) -> str:
    with pytest.raises(UserError) as caught:
        prompts.split(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    file = write(
        tmp_path / f"prompts.{kind}", [{"id": n, "caption": text} for n, text in enumerate(HARD)]
    )
    assert texts(Prompts(train=str(file), column="caption")) == EXPECTED
    assert texts(Prompts(train=str(file), column="caption", limit=3)) == EXPECTED[:3]


def test_text_has_a_prompt_per_line_with_any_line_end(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffone\r\n\r\n two\u2028 words \nthree, "quoted"\n'.encode())
    assert texts(Prompts(train=str(file))) == ["one", "two words", 'three, "quoted"']


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_filters_leave_out_and_count(kind: str, tmp_path: Path) -> None:
    """Rows with the columns that VidProM publishes, and a column of languages."""
    rows = [
        dict.fromkeys(VIDPROM, 0.001) | {"prompt": f"a cat of colour {n}", "language": "en"}
        for n in range(6)
    ]
    rows[1]["sexual_explicit"] = 0.9
    rows[2]["prompt"] = "cat"
    rows[3]["prompt"] = "long " * 50
    rows[4]["language"] = "fr"
    rows[5]["prompt"] = "a  cat of colour 0"
    for row in rows:
        row["uuid"] = row["time"] = "x"
    settings = Prompts(
        train=str(write(tmp_path / f"p.{kind}", rows)),
        nsfw_columns=tuple(VIDPROM[3:]),
        max_nsfw=0.2,
        min_chars=5,
        max_chars=100,
        language_column="language",
        languages=("EN",),
        heldout_share=0.5,
    )
    found = prompts.read(settings, settings.train, "prompts.train", None)
    assert [prompt.text for prompt in found.prompts] == ["a cat of colour 0"]
    left_out = {"unsafe": 1, "too short": 1, "too long": 1, "in another language": 1, "repeated": 1}
    assert found.left_out == left_out
    line = complaint(settings.model_copy(update={"min_chars": 200}))
    assert (
        "no prompt is left; left out: 5 too short, 1 too long; " in line
        and "loosen the filters" in line
    )


@pytest.mark.parametrize("flag", [True, "true", "True", 1, 1.0])
def test_flags_are_unsafe_too(flag: object, tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl", [{"prompt": "a", "nsfw": flag}, {"prompt": "b", "nsfw": False}]
    )
    assert texts(Prompts(train=str(file), nsfw_columns=("nsfw",))) == ["b"]


def test_images_stand_beside_the_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "one.png")
    (tmp_path / "empty.png").touch()
    good = {"caption": "a boat", "image": "pictures/one.png"}
    bad = [
        ({"caption": "a boat"}, "line 2 has no file name in 'image'"),
        ({"caption": "a boat", "image": "two.png"}, "line 2 names the image"),
        ({"caption": "a boat", "image": "empty.png"}, "which is empty"),
        ({"caption": "a boat", "image": "pictures"}, "which is no file"),
        ({"caption": "a boat", "image": "x" * 300}, "which cannot be read (File name too long)"),
        ({"image": "pictures/one.png"}, "line 2 has no text in 'caption'"),
    ]
    for row, message in bad:
        file = write(tmp_path / "p.jsonl", [good, row, good | {"caption": "a ship"}])
        settings = Prompts(train=str(file), column="caption", image_column="image")
        assert message in complaint(settings)
        assert complaint(settings).endswith("correct it, or set prompts.bad_rows=skip.")
        found = prompts.read(
            settings.model_copy(update={"bad_rows": "skip"}), str(file), "prompts.train", None
        )
        image = tmp_path / "pictures" / "one.png"
        assert found.prompts == [Prompt("a boat", image), Prompt("a ship", image)]
        assert found.left_out == {prompts.UNUSABLE: 1} and message in str(found.first_problem)
        assert found.prompts[1].place == f"prompts.train={file}: line 3"


def test_bad_rows_are_named_or_skipped(tmp_path: Path) -> None:
    cases = {
        "a.jsonl": (b'{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n', "line 2 is not JSON"),
        "b.jsonl": (b'{"prompt": "a"}\n["b"]\n{"prompt": "b"}\n', "line 2 is not a JSON object"),
        "c.jsonl": (
            b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n{"prompt": "b"}\n',
            "line 2 has half a character",
        ),
        "d.csv": (b'n,prompt\n1,"a\nb"\n2,c,d\n3,e\n', "line 4 has more cells than the header"),
        "e.csv": (b"n,prompt\n1,a\n2\n3,b\n", "line 3 has no text in 'prompt'"),
        "f.csv": (b"prompt,n\na,0\nb,high\nc,1\n", "line 3 has 'high' in 'n', which is neither"),
        "g.csv": (b"prompt,n\na,0\nb,\nc,1\n", "line 3 has '' in 'n'"),
        "h.csv": (b"prompt,n\na,0\nb,nan\nc,57\n", "line 3 has 'nan' in 'n'"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        nsfw = ("n",) if b"prompt,n" in content else ()
        settings = Prompts(train=str(tmp_path / name), nsfw_columns=nsfw, max_nsfw=1.0)
        line = complaint(settings)
        assert line.startswith(f"prompts.train={tmp_path / name}: {message}"), line
        skipping = settings.model_copy(update={"bad_rows": "skip"})
        skipped = 2 if name == "h.csv" else 1
        assert prompts.read(skipping, settings.train, "prompts.train", None).left_out == {
            prompts.UNUSABLE: skipped
        }


def test_wrong_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "latin1.csv").write_bytes(b"prompt\na\ngr\xfcn\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "quote.csv").write_text('prompt\na\n"' + "b" * 200_000)
    write(tmp_path / "columns.csv", [{"uuid": "1", "text": "a"}])
    write(tmp_path / "columns.parquet", [{"uuid": "1", "text": "a"}])
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "none.txt": ({}, "no such file"),
        "a.txt": ({"image_column": "image"}, "prompts.image_column=image: "),
        "latin1.csv": ({}, "line 3 is not UTF-8"),
        "empty.csv": ({}, "the file has no prompts; write one"),
        "broken.parquet": ({}, "not a Parquet file"),
        "quote.csv": ({}, "line 3 is not CSV"),
        "columns.csv": ({}, "prompts.column=prompt: no such column in"),
        "columns.parquet": (
            {"column": "text", "nsfw_columns": ("toxicity",)},
            "prompts.nsfw_columns.0=toxicity: ",
        ),
        "prompts.xlsx": ({}, "give one of .txt, .jsonl, .csv, .parquet"),
        "folder.csv": ({}, "Is a directory"),
    }
    (tmp_path / "folder.csv").mkdir()
    for name, (fields, message) in cases.items():
        assert message in complaint(Prompts(train=str(tmp_path / name), **fields)), name
    assert "prompts.languages" in complaint(
        Prompts(train=str(tmp_path / "columns.csv"), languages=("en",))
    )
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'fastgrpo[data]'" in complaint(
        Prompts(train=str(tmp_path / "columns.parquet"), column="text")
    )


def test_adding_prompts_moves_none_between_the_splits(tmp_path: Path) -> None:
    """Over many random sets: what is held out of a set is held out of every set that contains
    it.
    """
    chance = random.Random(0)
    words = [f"word{n}" for n in range(200)]
    pool = [" ".join(chance.sample(words, 4)) for _ in range(400)]
    sides: dict[str, bool] = {}
    for size in [20, 60, 150, 400]:
        lines = chance.sample(pool, size)
        (tmp_path / "p.txt").write_text("\n".join(lines))
        found = prompts.split(
            Prompts(train=str(tmp_path / "p.txt"), heldout_share=0.3, per_iteration=1)
        )
        assert {p.text for p in found.train} | {p.text for p in found.heldout} == set(lines)
        for prompt in (*found.train, *found.heldout):
            assert sides.setdefault(prompt.text, prompt in found.heldout) == (
                prompt in found.heldout
            )
            assert prompts.is_heldout(prompt.text.upper(), 0.3) == sides[prompt.text]
            assert prompts.is_heldout(prompt.text, 0.5) or not sides[prompt.text], (
                "a larger share holds out more"
            )


def test_the_held_out_share_is_as_large_as_asked_for() -> None:
    """Within four standard deviations of the binomial distribution."""
    count, share = 20_000, 0.05
    held = sum(prompts.is_heldout(f"prompt number {n}", share) for n in range(count))
    assert abs(held - count * share) < 4 * (count * share * (1 - share)) ** 0.5
    assert not any(prompts.is_heldout(str(n), 0.0) for n in range(100))
    assert all(prompts.is_heldout(str(n), 1.0) for n in range(100))


def test_splits_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    lines = [f"a prompt with the number {n}" for n in range(12)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    (tmp_path / "h.txt").write_text("\n".join(lines[:2]))
    train = str(tmp_path / "p.txt")
    assert "no held-out prompt is left of 12; raise it" in complaint(
        Prompts(train=train, heldout_share=1e-6)
    )
    assert "no training prompt is left of 12; lower it" in complaint(
        Prompts(train=train, heldout_share=1.0)
    )
    assert "2 prompts are also trained on" in complaint(
        Prompts(train=train, heldout=str(tmp_path / "h.txt"))
    )
    assert "prompts.per_iteration=32: there are" in complaint(
        Prompts(train=train, heldout_share=0.3)
    )


def test_a_text_with_two_images_is_held_out_once_and_never_split(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "two.png")
    rows = [
        {"prompt": f"boat {n}", "image": image}
        for n in range(40)
        for image in ("one.png", "two.png")
    ]
    file = write(tmp_path / "p.csv", rows)
    found = prompts.split(
        Prompts(train=str(file), image_column="image", heldout_share=0.4, per_iteration=1)
    )
    held = [prompt.text for prompt in found.heldout]
    assert len(held) == len(set(held)) and not set(held) & {prompt.text for prompt in found.train}
    assert len(found.train) == 2 * (40 - len(held))
    assert f"{len(held)} held out for another image" in found.summary


def test_check_reads_the_prompts_and_says_how_many(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        cli.main(["check", str(runs.RECIPE), "prompts.heldout=none", "prompts.heldout_share=0.1"])
        == 0
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"# prompts: [\d,]+ to train on, [\d,]+ held out", first)
    assert (
        cli.main(
            [
                "check",
                str(runs.RECIPE),
                "prompts.column=text",
                f"prompts.train={tmp_path / 'no.csv'}",
            ]
        )
        == 2
    )


@pytest.mark.parametrize("name", ["video", "image"])
def test_the_shipped_prompts_are_many_and_differ(name: str) -> None:
    lines = (ROOT / "data" / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200 and all(line == " ".join(line.split()) and line for line in lines)
    words = [set(re.findall(r"\w{4,}", line.lower())) for line in lines]
    for place, one in enumerate(words):
        for other in words[:place]:
            assert len(one & other) <= 0.5 * min(len(one), len(other)) or len(one & other) < 3
    found = prompts.split(Prompts(train=str(ROOT / "data" / f"prompts_{name}.txt")))
    assert len(found.train) >= 180 and len(found.heldout) >= 5
