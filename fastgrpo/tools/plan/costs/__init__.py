"""What a rank holds, computes, sends, and what its rewards take: closed forms.

Read `memory.py` first.
"""
