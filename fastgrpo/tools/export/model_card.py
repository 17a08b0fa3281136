"""The model card of an export: base model, training, reward, and how to load the folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgrpo import models
from fastgrpo.checkpoint.reader import Weights
from fastgrpo.core.config import Model, Recipe, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import null_to_nan, read_json
from fastgrpo.models.loading import diffusers_folder, source, weight_files
from fastgrpo.run.tracker import read_metrics
from fastgrpo.tools.export import shard_writer
from fastgrpo.training import methods


def write(file: Path, run: Path, recipe: Recipe, weights: Weights, dtype: str) -> None:
    """Write a README.md with the front matter that the hub reads."""
    step = int(weights.checkpoint.name.removeprefix("step-"))
    apart = not (file.parent / "model_index.json").exists()
    method = methods.traits(recipe).title or recipe.objective.kind
    lines = [
        *front_matter(recipe),
        f"# {run.resolve().name}, {weights.label}",
        "",
        f"Trained by {method} with fastgrpo from {base_name(recipe)}: "
        f"{step} of {recipe.run.iterations} iterations, {recipe.prompts.per_iteration} prompts x "
        f"{recipe.rollout.samples_per_prompt} samples each. The weights are the "
        f"{'moving average' if weights.averaged else 'raw ones'}, in {dtype}.",
        "",
        *loading(recipe.model, apart),
        "",
        *rewards(run, recipe, step),
        "## Recipe",
        "",
        "```toml",
        recipe.to_toml().rstrip(),
        "```",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


FOLDER = '"FOLDER"'


def base_name(recipe: Recipe) -> str:
    """The base model as a hub id or the name of its folder."""
    name = recipe.model.network or recipe.model.path
    return Path(name).name if Path(name).is_absolute() else name


def front_matter(recipe: Recipe) -> list[str]:
    """YAML between dashes; the base model only where it is a hub id."""
    name = recipe.model.network or recipe.model.path
    base = [f"base_model: {paths.hub_name(name)[0]}"] if is_hub_id(name) else []
    return [
        "---",
        "library_name: diffusers",
        *base,
        "tags:",
        f"- {recipe.objective.kind}",
        "- fastgrpo",
        "---",
        "",
    ]


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one that others can load by."""
    return paths.is_hub_id(name) and not Path(name).is_dir()


def where_from(name: str, else_: str, variant: str | None) -> str:
    """Arguments of from_pretrained for what others can load by its name.

    else_: a word for the folder that is meant, where they cannot
    """
    named, revision = paths.hub_name(name) if is_hub_id(name) else (else_, None)
    more = {"revision": revision, "variant": variant}
    return f'"{named}"' + "".join(f', {key}="{value}"' for key, value in more.items() if value)


def loading(model: Model, apart: bool) -> list[str]:
    """Lines on loading the folder, and on sampling from it with the sampler of training.

    apart: adapters alone, without the base model
    """
    part = models.declared(model.family, "NETWORK")
    index = diffusers_folder.read_json(source.locate(model) / "model_index.json")
    pipeline = models.declared(model.family, "PIPELINE", index["_class_name"])
    base = where_from(model.source, "BASE", model.variant)
    if apart and model.network is not None:  # the base folder's own network is another one
        code = [
            *network_loading(
                model,
                model.network,
                part=part,
                usual=index[part][1],
                pipeline=pipeline,
            ),
            f"pipeline = {pipeline}.from_pretrained({base}, {part}={part})",
        ]
    else:
        code = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base if apart else FOLDER})"
            f"  # a {pipeline}",
        ]
    if apart:
        code += ['pipeline.load_lora_weights("FOLDER")', *_second_adapters(model.family)]
    meanings = {
        "BASE": "the base model",
        "NETWORK": "the folder of its network",
        "FOLDER": "this folder",
    }
    used = [
        f"{name} is {meaning}"
        for name, meaning in meanings.items()
        if any(f'"{name}"' in line for line in code)
    ]
    return [
        "```python",
        *code,
        "```",
        "",
        f"{', '.join(used)}.",
        "",
        'Or `fastgrpo sample FOLDER --prompt "..." --out samples`.',
    ]


def _second_adapters(family: str) -> list[str]:
    """The lines that load the adapters of a second network."""
    if len(models.networks(family)) == 1:
        return []
    name = shard_writer.MORE_ADAPTERS.format(2)
    return [
        f'more = {{"weight_name": "{name}", "load_into_transformer_2": True}}',
        'pipeline.load_lora_weights("FOLDER", **more)',
    ]


def network_loading(model: Model, network: str, part: str, usual: str, pipeline: str) -> list[str]:
    """The lines that load the network of a folder of its own, for the pipeline's `part`.

    usual: its class, where its config.json names none
    """
    where = diffusers_folder.network_folder(model, part)
    kind = diffusers_folder.read_json(where / "config.json").get("_class_name", usual)
    below = where != source.locate(model, "network")
    inside = f', subfolder="{part}"' if below else ""
    named = where_from(network, "NETWORK", weight_files.read_variant(where))
    return [
        f"from diffusers import {', '.join(sorted((kind, pipeline)))}",
        "",
        f"{part} = {kind}.from_pretrained({named}{inside})",
    ]


def rewards(run: Path, recipe: Recipe, step: int) -> list[str]:
    """The training reward at this step and, where the run ended here, the held-out rewards."""
    lines = ["## Reward", ""]
    metrics = run / "metrics.jsonl"
    every = read_metrics(metrics) if metrics.exists() else []
    rows = [row for row in every if row["iteration"] == step - 1 and "reward/sum" in row]
    if rows:
        parts = ", ".join(
            f"{part} {rows[-1][f'reward/{part}']:.3f}"
            for part in recipe.weights
            if f"reward/{part}" in rows[-1]
        )
        lines += [
            f"Mean over the samples of iteration {step}: weighted sum {rows[-1]['reward/sum']:.3f} "
            f"({parts}).",
            "",
        ]
    summary = run / "summary.json"
    remedy = "remove it and start the run again, which compares anew"
    result = null_to_nan(read_json(summary, "run", remedy)) if summary.exists() else {}
    if result.get("iterations") == step:
        try:
            table = held_out_table(result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"run: {summary} is not what a run wrote ({error!r}); {remedy}."
            ) from None
        lines += [
            "Held-out prompts, the same seeds before and after, ODE sampler, moving average where "
            "there is one:",
            "",
        ]
        lines += [*table, ""]
    return lines if len(lines) > 2 else []


def held_out_table(result: Mapping[str, Any]) -> list[str]:
    """The held-out rewards of a summary, a row per part."""
    lines = ["| part | before | after | difference (95 % interval) |", "|---|---|---|---|"]
    for part, before in result["before"].items():
        low, high = result["ci95"][part]
        bounds = f"{low:+.3f} .. {high:+.3f}" if math.isfinite(low) else "-"
        change = f"{result['difference'][part]:+.3f} ({bounds})"
        lines.append(f"| {part} | {before:.3f} | {result['after'][part]:.3f} | {change} |")
    return lines
