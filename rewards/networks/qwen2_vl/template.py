"""A judge's prompt template, read from its official repository's file and checked by its hash.

The text is not shipped here. The file is parsed and never executed.
"""

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.errors import UserError


@dataclass(frozen=True)
class Official:
    """Where a judge's template lies."""

    file: str  # its name in the repository
    repository: str
    names: Sequence[str]  # of the texts in it that make the template, joined in this order
    sha256: str  # of the joined text


def check_named(template: str | None, official: Official) -> Path:
    """The file that `rewards.options.template` names. Raises UserError where it names none."""
    if template is None:
        raise UserError(
            f"rewards.options.template: missing; name {official.file} of "
            f"{official.repository}, which is read and not run."
        )
    return Path(template)


def read(file: Path, official: Official) -> str:
    """The template in the official .py file, or the whole text of another file.

    Raises UserError where there is none.
    """
    where = f"rewards.options.template={file}"
    try:
        text = file.read_bytes().decode("utf-8")
        if file.suffix != ".py":
            return text
        body = ast.parse(text).body
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be read ({_reason(error)}); name {official.file} of "
            f"{official.repository}, which is read and not run."
        ) from None
    texts = {
        target.id: str(node.value.value)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in official.names:
        if name not in texts:
            raise UserError(
                f"{where}: sets no text {name}; name the official repository's {official.file}."
            )
    return "".join(texts[name] for name in official.names)


def check(template: str, accepted: str | None, file: Path, official: Official) -> str:
    """The template's SHA-256: that of the official one, or the one that the recipe accepts.

    Raises UserError for another template.
    """
    digest = hashlib.sha256(template.encode()).hexdigest()
    if digest != (accepted or official.sha256).lower():
        raise UserError(
            f"rewards.options.template={file}: its SHA-256 is {digest}, not "
            f"{accepted or official.sha256}; name the official {official.file}, or accept this "
            "text with rewards.options.template_sha256."
        )
    return digest


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its name."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).splitlines()[0]
