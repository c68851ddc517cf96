"""Planning for plan.py: compiles a train step for chips that are not here and reads its memory, FLOPs and
collectives."""
