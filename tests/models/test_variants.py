"""A folder whose weights were saved as a variant, or whose config begins with a BOM."""

from pathlib import Path

import pytest

from fastgrpo.core.errors import UserError
from fastgrpo.models.loading import weight_files


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "pytorch_model"])
def test_weights_that_are_a_variant_alone_are_named(stem: str, tmp_path: Path) -> None:
    file = tmp_path / f"{stem}.fp16.safetensors"
    file.touch()
    with pytest.raises(UserError, match=rf"only as a variant \({file.name}\), which is not read"):
        weight_files.check_shards(tmp_path)
    plain = stem if stem == "diffusion_pytorch_model" else "model"
    (tmp_path / f"{plain}.safetensors").touch()  # beside which a variant is nobody's concern
    weight_files.check_shards(tmp_path)


def test_a_bom_is_no_part_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}', encoding="utf-8-sig")
    assert weight_files.read_json(file) == {"a": 1}
