"""Captions on pictures have no boxes, whatever their script."""

import pytest
from PIL import Image, ImageDraw, ImageFont

from fastgrpo.data import lettering
from fastgrpo.data.lettering import NO_LETTER

TEXTS = ["a red square", "ein grüner Kreis", "红色的方块", "مربع أحمر", "🦊 fox", "Жук", "a\u200db"]


@pytest.mark.parametrize("installed", [True, False])
def test_no_caption_has_a_box(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setattr(lettering, "FONTS", ())
    for text in TEXTS:
        font, (shown,) = lettering.lettering([text], 13)
        box = bytes(font.getmask(NO_LETTER))
        assert not any(bytes(font.getmask(letter)) == box for letter in shown if letter != " ")
        assert "\u200d" not in shown
        picture = Image.new("L", (400, 30))
        ImageDraw.Draw(picture).text((2, 2), shown, fill=255, font=font)
        assert picture.getbbox() is not None


def test_letters_that_no_font_has_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "FONTS", ())
    shown = lettering.lettering(["红 x", "🦊", "é\x1b"], 13)[1]
    assert shown == ["\\u7ea2 x", "\\U0001f98a", "\\xe9"]


def test_latin_captions_keep_pillows_own_font() -> None:
    font, shown = lettering.lettering(["a red square", "two"], 13)
    assert shown == ["a red square", "two"]
    assert (
        font.getmask("square").getbbox() == ImageFont.load_default(13).getmask("square").getbbox()
    )
