"""The tiny world: clips of coloured shapes that move, their captions, and tiny networks for them.

`python -m fastgrpo.data.tiny_world` makes data/tiny_hunyuan_video. Read `shapes.py` first. Imports
core alone.
"""
