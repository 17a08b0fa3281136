"""The tiny world: clips of coloured shapes that move, their captions, and the command that trains its networks.

`python -m fastgrpo.data.tiny_world` makes data/tiny_hunyuan_video. Read `shapes.py` first. Imports core alone.
"""
