"""The measured workloads, ours and those of peers; what is imported by peers' interpreters is plain Python."""
