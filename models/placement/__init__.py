"""Where a text encoder's weights lie while it encodes: whole on the GPU, or in blocks that come.

Imports core, models.sizes and parallel. Read `text_network.py` first.
"""
