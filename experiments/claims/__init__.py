"""Published claims, each run at a small scale and decided by an interval."""
