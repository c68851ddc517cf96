"""The workloads in peer libraries. Each module is a command, such as ``python -m benchmarks.peers.trl_trainers
sft-s``."""
