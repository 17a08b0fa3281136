"""`fastgrpo evaluate --benchmark`: GenEval, HPS and the paper's Tables 2 to 5, on one run.

A protocol names prompts, images per prompt and judges. What the paper does not state is noted with
every result, and a number that cannot be measured here is marked and never filled in. Read
`protocols.py` first.
"""
