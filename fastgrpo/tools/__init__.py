"""One folder for each command that looks at a recipe, a run or clips. `cli` has their options.

Imports every floor below; evaluate uses score, score uses sample, sample uses export, and preflight
uses plan.
"""
