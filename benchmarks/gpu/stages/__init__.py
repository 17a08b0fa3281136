"""One file per stage of `python -m benchmarks.gpu`, each with a function run(setup, report).

Nothing is imported here, so that a stage stays free of libraries that it does not measure.
"""
