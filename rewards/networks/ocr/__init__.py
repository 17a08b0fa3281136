"""Text in pictures: the engine that reads it, and how near it is to what was asked for.

Read `matching.py` first. Imports core alone; the engine needs the extra `ocr`.
"""
