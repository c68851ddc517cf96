"""Peer libraries' versions of the workloads; each module is a command: ``python -m benchmarks.peers.trl_trainers
sft-s``."""
