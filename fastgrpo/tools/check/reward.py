"""`fastgrpo check-reward`: whether a reward keeps the contract, and what a clip takes."""

from fastgrpo.core.config import RewardSpec
from fastgrpo.tools.check import reward_contract


def check_reward(spec: RewardSpec, behind_server: bool) -> int:
    """Check a reward by each rule and print what came of it.

    behind_server: whether to start a server for it, too
    returns 0 where it keeps them all, else 1
    Raises UserError where the reward cannot be loaded.
    """
    rules = [name for name in reward_contract.RULES if behind_server or name != "server"]
    found = reward_contract.contract(spec, rules)
    width = max(map(len, rules))
    for name, broken in found.items():
        kept = reward_contract.RULES[name][1]
        print(f"{'BROKEN' if broken else 'ok':8}{name:{width + 2}}{kept}")
        for line in broken:
            print(f"{'':8}{'':{width + 2}}but {line}")
    if any(found.values()):
        return 1
    seconds, size = reward_contract.seconds_per_clip(spec)
    print(f"{spec.name} takes {seconds * 1e3:.3g} ms per clip of {size}.")
    return 0
