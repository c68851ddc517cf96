"""What the benchmarks share. `sizes` and `child` are plain Python, since peers' interpreters read them too."""
