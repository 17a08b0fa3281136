"""`fastgrpo fetch`."""

import argparse

from fastgrpo.cli.options import add_recipe, recipe_of


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo fetch`."""
    command = commands.add_parser(
        "fetch",
        help="fetch everything that a recipe needs from hubs",
        description="List the repositories that a recipe and its rewards name and that are not "
        "here, with sizes, licences, gates and target folders; then fetch them into the hub's "
        "cache, or into the folders that the recipe names, and compare each file with the hub's "
        "hash. Interrupted, it goes on where it was. What no hub has is listed with its address.",
        epilog="example: fastgrpo fetch launch/t2v_hunyuan.toml --dry-run",
    )
    command.set_defaults(action=_run_fetch)
    command.add_argument("--dry-run", action="store_true", help="list alone, fetch nothing")
    add_recipe(command)


def _run_fetch(arguments: argparse.Namespace) -> int:
    """Returns 1 where something is left to be got by hand."""
    recipe = recipe_of(arguments)
    from huggingface_hub import HfApi

    from fastgrpo.core.config.checks import failing
    from fastgrpo.core.errors import UserErrors
    from fastgrpo.tools.start import fetch

    wanted, api = fetch.needs(recipe), HfApi()
    listed: list[fetch.Listed] = []
    looked = [
        lambda one=one: listed.append(fetch.look_up(one, api)) for one in wanted if not one.by_hand
    ]
    mistakes = failing(looked)
    for one in listed:
        print(one.line())
    by_hand = [one for one in wanted if one.by_hand]
    for need in by_hand:
        print(
            f"{need.key}: on no hub; get {' '.join(need.files)} of {need.repository} -> {need.target}"
        )
    if mistakes:
        raise UserErrors(mistakes)
    total = sum(one.size for one in listed) / fetch.GB
    print(f"{total:,.2f} GB in all" if wanted else "nothing is missing that a hub has")
    if not arguments.dry_run:
        fetch.check_room(listed)
        for one in listed:
            print(f"{one.need.key}: in {fetch.fetch(one)}")
    return 1 if by_hand else 0
