"""HPSv3: its head and names of weights, its pictures, and where its template lies.

Read `network.py` first. Imports core, rewards.common and networks.qwen2_vl.
"""
