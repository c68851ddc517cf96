"""Planning for plan.py: compiles a train step for chips that need not be present and measures its memory, FLOPs and
collectives.
"""
