"""The same works in other libraries, each a command of its own: ``python -m benchmarks.peers.trl_sft sft-s``."""
