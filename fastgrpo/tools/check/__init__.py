"""`fastgrpo check`: every mistake of a recipe that shows without loading a model. `fastgrpo
check-reward`: what a reward breaks of the contract. Read `check.py` first, then `reward_contract.py`.
"""
