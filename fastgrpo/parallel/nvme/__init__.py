"""Masters and AdamW's moments on a node's NVMe: `distributed.offload = "nvme"`.

Imports core alone. Read `state_file.py` first, then `adamw.py`.
"""
