"""`fastgrpo check`: every mistake of a recipe that shows without loading a model."""
