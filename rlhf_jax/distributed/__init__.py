"""Multi-host runs: rendezvous, heartbeats, and agreement on when to stop."""
