"""A folder whose weights are of another variant or are pointers, or whose config has a BOM."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Model
from fastgrpo.core.errors import UserError
from fastgrpo.models.loading import policies, weight_files
from tests import ROOT
from tests.harness import runs


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_weights_that_are_a_variant_alone_are_named(stem: str, tmp_path: Path) -> None:
    file = tmp_path / f"{stem}.fp16.safetensors"
    file.touch()
    with pytest.raises(
        UserError, match=rf"only as a variant \({file.name}\); set model.variant=fp16"
    ):
        weight_files.check_shards(tmp_path)
    (tmp_path / f"{stem}.safetensors").touch()  # beside which a variant is nobody's concern
    weight_files.check_shards(tmp_path)


def test_a_bom_is_no_part_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}', encoding="utf-8-sig")
    assert weight_files.read_json(file) == {"a": 1}


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_a_pointer_of_git_lfs_in_a_model_folder_is_told_with_its_remedy(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "tiny_hunyuan_video", folder)
    kinds = ("*.safetensors", "tokenizer.json", "scheduler_config.json")
    (file,) = [file for kind in kinds for file in (folder / part).glob(kind)]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    said = (
        f"model.path: {file}: is a pointer of git-lfs and not the file; get it with git lfs pull."
    )
    assert cli.main(["check", str(runs.RECIPE), f"model.path={folder}"]) == 2
    assert capsys.readouterr().err == f"fastgrpo: {said}\n"
    settings = Model(family="hunyuan_video", path=str(folder))
    video = config.load(runs.RECIPE).video
    with pytest.raises(UserError, match=re.escape(said)):
        policies.load(settings, torch.device("cpu"))
        with policies.encoder(settings, video, torch.device("cpu")):
            pytest.fail("loaded")
