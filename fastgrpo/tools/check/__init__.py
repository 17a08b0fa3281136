"""`fastgrpo check`: every mistake of a recipe that shows without loading a model. `fastgrpo
check-reward`: what a reward breaks of the contract.

Read `check.py` first; `without_effect.py` has the keys that others leave without effect,
`reward_contract.py` the rules.
"""
