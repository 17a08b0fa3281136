"""Prompt files of every kind, what is left out of them, and the held-out split."""

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fastgrpo.cli import main as cli
from fastgrpo.core.config import Prompts
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.data import images, prompts, video
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
        "prompts.xlsx": ({}, "give one of .txt, .jsonl, .json, .csv, .tsv, .parquet, or"),
        "folder.csv": ({}, "folder.csv: no file there is of a known kind; give"),
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


LINES = [f"a red square number {n}" for n in range(6)]


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    """A prompt file of these lines, of the kind that its suffixes say."""
    content = "\n".join(["prompt", *lines] if ".csv" in file.name else lines) + "\n"
    if ".jsonl" in file.name:
        content = "".join(json.dumps({"prompt": line}) + "\n" for line in lines)
    data = content.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "csv.gz", "jsonl"])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("\u200b\u2061", "has no visible letter in 'prompt'"),
        ("\ufeff\u200b", "has no visible letter in 'prompt'"),
        ("t\0wo", "has the control character U+0000 in 'prompt'"),
        ("\x1b[31mtwo", "has the control character U+001B in 'prompt'"),
    ],
)
def test_a_line_that_is_no_text_is_named_or_left_out(
    tmp_path: Path, kind: str, line: str, told: str
) -> None:
    file = write_lines(tmp_path / f"p.{kind}", ["one", line, "three"])
    settings = Prompts(train=str(file))
    assert f"line {3 if 'csv' in kind else 2} {told}; correct it" in complaint(settings)
    skipping = settings.model_copy(update={"bad_rows": "skip"})
    found = prompts.read(skipping, str(file), "prompts.train", None)
    assert [prompt.text for prompt in found.prompts] == ["one", "three"]
    assert found.left_out == {prompts.UNUSABLE: 1}


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_a_byte_order_mark_inside_is_taken_off_and_told(tmp_path: Path, kind: str) -> None:
    """As `cat one.txt two.txt` leaves it; letters that join others stay."""
    file = write_lines(tmp_path / f"p.{kind}", ["one", "\ufefftwo", "👨\u200d👩"])
    if kind == "jsonl":
        file.write_text(file.read_text().replace('{"prompt": "\\ufefftwo', '\ufeff{"prompt": "two'))
    found = prompts.split(Prompts(train=str(file), heldout_share=0.3, per_iteration=1))
    assert {prompt.text for prompt in (*found.train, *found.heldout)} == {
        "one",
        "two",
        "👨\u200d👩",
    }
    assert found.summary.endswith("; rows used: 1 with a byte-order mark that was taken off")


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json", "tsv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_utf_16_is_named_with_its_conversion(tmp_path: Path, kind: str, encoding: str) -> None:
    file = write_lines(tmp_path / f"p.{kind}", LINES)
    file.write_bytes(file.read_text().encode(encoding))
    told = "utf-16be" if encoding == "utf-16-be" else "utf-16le"
    line = complaint(Prompts(train=str(file), bad_rows="skip"))
    assert line.endswith(
        f"is UTF-16 and not UTF-8; convert the file, e.g. iconv -f {told} -t utf-8."
    )


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.parquet", "p.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_file(tmp_path: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_bytes(pointer)
    assert "git lfs pull" in complaint(Prompts(train=str(tmp_path / name), bad_rows="skip"))
    (tmp_path / "a.png").write_bytes(pointer)
    with pytest.raises(UserError, match="git lfs pull"):
        images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("after", ["", 'x,"quoted"\n'])
def test_a_quote_that_is_never_closed_swallows_no_rows(
    tmp_path: Path, ending: str, after: str
) -> None:
    rows = "".join(f"{line},y\n" for line in LINES)
    (tmp_path / "p.csv").write_text(f'prompt,b\n{rows}"open,y\n{rows}{after}x,y{ending}')
    line = complaint(Prompts(train=str(tmp_path / "p.csv"), bad_rows="skip"))
    assert "line 8 is not CSV (" in line and line.endswith("correct its quotes.")


def test_csv_of_long_cells_repeated_headers_and_values_over_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text(f'prompt,more\na,{"x" * 200_000}\n\ufeffprompt,more\n"b\nc",y\nd,z\n')
    assert "line 3 repeats the header" in complaint(Prompts(train=str(file)))
    skipping = Prompts(train=str(file), bad_rows="skip", heldout_share=0.4, per_iteration=1)
    found = prompts.read(skipping, str(file), "prompts.train", None)
    assert [prompt.text for prompt in found.prompts] == ["a", "b c", "d"]
    assert found.notes == {"spanning several lines of the file": 1}
    file.write_text("prompt,prompt\na,b\n")
    assert "has 2 columns of that name; rename" in complaint(Prompts(train=str(file)))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "prompt": "b"}\n')
    assert "line 1 has 'prompt' twice" in complaint(Prompts(train=str(tmp_path / "p.jsonl")))


def layout(tmp_path: Path, kind: str) -> str:
    """LINES in one of the layouts in which data sets are published.  returns prompts.train"""
    nested = [{"caption": {"text": line, "model": "m"}, "id": n} for n, line in enumerate(LINES)]
    listed = [{"caption": {"text": [line, f"{line} again"]}} for line in LINES]
    file = tmp_path / kind
    match kind:
        case "nested.parquet" | "nested.jsonl":
            return str(write(file, nested))
        case "listed.parquet" | "listed.jsonl":
            return str(write(file, listed))
        case "array.json":
            file.write_text(json.dumps(nested, indent=1))
        case "lines.json":
            write(tmp_path / "x.jsonl", nested).rename(file)
        case "rows.jsonl.gz":
            file.write_bytes(gzip.compress(write(tmp_path / "x.jsonl", nested).read_bytes()))
        case "rows.tsv":
            file.write_text("id\tcaption.text\n" + "".join(f"1\t{line}\n" for line in LINES))
        case _:
            for number in range(3):
                suffix = "parquet" if "parquet" in kind else "jsonl"
                write(tmp_path / f"s-{number}.{suffix}", nested[2 * number : 2 * number + 2])
            (tmp_path / "README.md").write_text("a card")
            return str(tmp_path) if kind.startswith("folder") else str(tmp_path / "s-*")
    return str(file)


@pytest.mark.parametrize(
    "kind",
    [
        *("nested.parquet", "nested.jsonl", "listed.parquet", "listed.jsonl", "array.json"),
        *("lines.json", "rows.jsonl.gz", "rows.tsv", "folder of parquet", "folder of jsonl"),
        *("glob of parquet", "glob of jsonl"),
    ],
)
def test_layouts_of_published_data_sets(tmp_path: Path, kind: str) -> None:
    settings = Prompts(train=layout(tmp_path, kind), column="caption.text")
    found = prompts.read(settings, settings.train, "prompts.train", None)
    assert [prompt.text for prompt in found.prompts] == LINES
    several = {"with several captions, of which the first is used": 6}
    assert found.notes == (several if kind.startswith("listed") else {})
    if "of" in kind:
        assert re.search(r"s-1\.\w+, (line|row) 1$", found.prompts[2].place)
    assert texts(settings.model_copy(update={"limit": 3})) == LINES[:3]


def test_wrong_layouts_are_one_line(tmp_path: Path) -> None:
    layout(tmp_path, "folder of parquet")
    (tmp_path / "more.txt").write_text("a\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 999)[:-20])
    (tmp_path / "no.csv.gz").write_text("prompt\na\n")
    (tmp_path / "cut.json").write_text('[{"prompt": "a"}, {"pro')
    cases = {
        ".": "holds files of several kinds (.json, .jsonl, .parquet, .csv, .txt); name those",
        "empty": "no file there is of a known kind",
        "none-*.csv": "no file there is of a known kind",
        "cut.jsonl.gz": "damaged (Compressed file ended",
        "no.csv.gz": "damaged (Not a gzipped file",
        "cut.json": "is not JSON",
    }
    for name, told in cases.items():
        line = complaint(Prompts(train=str(tmp_path / name)))
        assert told in line or (name == "." and "holds files of several kinds (" in line), line


def test_a_column_of_another_name_is_told_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"caption": "a", "image": "b.png"}])
    assert complaint(Prompts(train=str(file))).endswith(
        "line 1 has no text in 'prompt'; it has caption, image: name one in prompts.column, "
        "correct it, or set prompts.bad_rows=skip."
    )


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e999", "9" * 5000])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_numbers_beyond_all_floats_are_one_short_line(
    tmp_path: Path, number: str, kind: str
) -> None:
    file = tmp_path / f"p.{kind}"
    one = '{"prompt": "a", "nsfw": NUMBER}\n' if kind == "jsonl" else "prompt,nsfw\na,NUMBER\n"
    file.write_text(one.replace("NUMBER", number))
    line = complaint(Prompts(train=str(file), nsfw_columns=("nsfw",)))
    assert re.search(r"line \d (has '?-?(9{30,40}|inf|1e999)|is not JSON)", line)
    assert len(line) < 300 + len(str(file))


def test_prompts_that_differ_in_case_alone_are_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a red square\na blue square\n")
    (tmp_path / "heldout.txt").write_text("A Red Square\n")
    settings = Prompts(
        train=str(tmp_path / "train.txt"), heldout=str(tmp_path / "heldout.txt"), per_iteration=1
    )
    assert "1 prompts are also trained on, such as 'A Red Square'" in complaint(settings)


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["struct", "bytes", "path"])
def test_pictures_inside_a_parquet_file(tmp_path: Path, form: str) -> None:
    """Hugging Face's Image column, over several groups of rows."""
    colours = [(40 * n, 10, 200) for n in range(6)]
    rows = []
    for number, (line, colour) in enumerate(zip(LINES, colours, strict=True)):
        content = picture(colour)
        (tmp_path / f"{number}.png").write_bytes(content)
        value: object = content
        if form != "bytes":
            value = {"bytes": content if form == "struct" else None, "path": f"{number}.png"}
        rows.append({"text": line, "image": value})
    file = write(tmp_path / "p.parquet", rows)
    settings = Prompts(train=str(file), column="text", image_column="image")
    found = prompts.read(settings, str(file), "prompts.train", None).prompts
    assert all(isinstance(prompt.image, Path) == (form == "path") for prompt in found)
    for prompt, colour in [*zip(found, colours, strict=True), (found[0], colours[0])]:
        assert prompt.image is not None
        assert images.read_image(prompt.image)[0, 0].tolist() == list(colour)
    write(tmp_path / "q.parquet", [{"text": "a", "image": {"bytes": b"no picture", "path": None}}])
    (bad,) = prompts.read(settings, str(tmp_path / "q.parquet"), "prompts.train", None).prompts
    assert bad.image is not None
    with pytest.raises(
        UserError, match=r"q\.parquet: row 1 of 'image': cannot be read \(neither a pict"
    ):
        images.read_image(bad.image)


def test_fewer_held_out_prompts_than_are_to_be_evaluated_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with t2v_hunyuan's own prompts, of which 6 of 200 are held out."""
    overrides = ["prompts.heldout=none", "prompts.heldout_share=0.05", "prompts.limit=120"]
    assert cli.main(["check", str(ROOT / "launch" / "t2v_tiny.toml"), *overrides]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "# evaluate.prompts=24: only 5 prompts are held out, and all of them will be evaluated; "
        "raise prompts.heldout_share (0.05) for more."
    )


@pytest.mark.parametrize("codec", ["h264", "damaged"])
def test_a_video_in_a_parquet_file_gives_its_first_frame(codec: str, tmp_path: Path) -> None:
    """As a file of it does, of which decord may be the reader."""
    file = tmp_path / "clip.mp4"
    pixels = torch.arange(4 * 32 * 48 * 3).reshape(4, 32, 48, 3).remainder(251).byte()
    video.write_mp4(file, pixels, 8.0)
    content = file.read_bytes()
    if codec == "damaged":
        content = content[:40] + bytes(len(content) - 40)
    write(tmp_path / "q.parquet", [{"text": "a", "image": {"bytes": content, "path": None}}])
    settings = Prompts(train=str(tmp_path / "q.parquet"), column="text", image_column="image")
    (prompt,) = prompts.read(settings, settings.train, "prompts.train", None).prompts
    assert prompt.image is not None
    if codec == "damaged":
        with pytest.raises(UserError, match=r"cannot be read \(neither a picture nor a video"):
            images.read_image(prompt.image)
    else:
        assert torch.equal(images.read_image(prompt.image), images.read_image(file))
