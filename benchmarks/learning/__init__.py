"""What training gains: runs of the tiny world, their curves and their pictures.

Read first: campaign.py, which trains a list of recipes in turn and keeps the finished ones.
ablations.py and learning_curves.py are questions asked with it; headroom.py reads the held-out
gains of one run.
"""
