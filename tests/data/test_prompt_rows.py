"""What a prompt's row says beside its text reaches the rewards; folders of captioned pictures."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from fastgrpo.core.config import Prompts
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.core.reward import row_of
from fastgrpo.data import prompts
from fastgrpo.data.prompt_files import content_hash

ROWS: list[dict[str, Any]] = [
    {"prompt": "two  boats", "text": "OPEN", "count": 2},
    {"prompt": "a cat", "text": "SHUT", "count": 0},
]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    file = folder / f"p.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return str(file)


def read(settings: Prompts) -> list[Prompt]:
    return prompts.read(settings, settings.train, "prompts.train", settings.limit).prompts


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_columns_travel_with_their_prompt(kind: str, tmp_path: Path) -> None:
    found = read(Prompts(train=write(tmp_path, kind, ROWS), reward_columns=("text", "count")))
    texts = [prompt.for_rewards for prompt in found]
    assert texts == ["two boats", "a cat"]
    values = [(row_of(text)["text"], int(row_of(text)["count"])) for text in texts]
    assert values == [("OPEN", 2), ("SHUT", 0)]
    assert row_of("a plain text") == {}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_wrong_column_says_which_there_are(kind: str, tmp_path: Path) -> None:
    settings = Prompts(train=write(tmp_path, kind, ROWS), reward_columns=("texts",))
    with pytest.raises(UserError, match=r"texts.*(has|have) prompt, text, count\."):
        read(settings)
    settings = Prompts(train=settings.train, image_column="picture")
    with pytest.raises(UserError, match=r"has? prompt, text, count(\.|: name one in prompts\.im)"):
        read(settings)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "two boats", "text": "OTHER"}, "repeats a prompt with other values"),
        ({"prompt": "a dog", "text": float("nan")}, "has no text, number or list in 'text'"),
        ({"prompt": "a dog", "text": "x" * 5000}, "has 5,002 bytes in 'text', above 4,096"),
    ],
)
def test_a_value_that_cannot_travel_is_a_bad_row(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    train = write(tmp_path, "jsonl", [*ROWS, row])
    with pytest.raises(UserError, match=f"line 3 {said}"):
        read(Prompts(train=train, reward_columns=("text",)))
    skipping = Prompts(train=train, reward_columns=("text",), bad_rows="skip")
    assert len(read(skipping)) == 2


def test_a_row_may_lack_a_value_and_a_reference_travels_as_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "image": "0.png", "exclude": ["cat"]},
        {"prompt": "b", "image": "0.png"},
    ]
    columns = ("image", "exclude")
    train = write(tmp_path, "jsonl", rows)
    found = read(Prompts(train=train, image_column="image", reward_columns=columns))
    image = str(tmp_path / "0.png")
    assert [prompt.row for prompt in found] == [
        {"image": image, "exclude": ["cat"]},
        {"image": image},
    ]


def test_a_folder_of_captioned_pictures_is_a_prompt_file(tmp_path: Path) -> None:
    for name, caption in (("b", "a  boat\n"), ("a", "a cat")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    folder = str(tmp_path)
    images = Prompts(train=folder, image_column="image")
    assert [(p.text, p.image) for p in read(images)] == [
        ("a cat", tmp_path / "a.png"),
        ("a boat", tmp_path / "b.png"),
    ]
    assert [prompt.image for prompt in read(Prompts(train=folder))] == [None, None]
    before = content_hash(folder, "prompts.train")
    (tmp_path / "a.txt").write_text("a dog")
    assert content_hash(folder, "prompts.train") != before
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.png has no caption b\.txt beside it"):
        read(images)
    with pytest.raises(UserError, match=r"prompts\.reward_columns\.0=x: .* has no columns"):
        read(Prompts(train=folder, reward_columns=("x",)))


def test_an_array_of_texts_is_a_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a cat", "a  boat"]')
    found = read(Prompts(train=str(tmp_path / "p.json"), column="caption"))
    assert [prompt.text for prompt in found] == ["a cat", "a boat"]


def test_the_hash_of_shards_is_of_their_names_and_contents(tmp_path: Path) -> None:
    """A resumed run compares it: a folder or a pattern has no content of its own."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    before = content_hash(str(tmp_path), "prompts.train")
    assert before == content_hash(str(tmp_path / "*.txt"), "prompts.train")
    (tmp_path / "b.txt").write_text("c")
    assert before != content_hash(str(tmp_path), "prompts.train")
