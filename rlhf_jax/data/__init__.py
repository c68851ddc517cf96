"""Data processing: readers, chat formats, token rows, and batches for the train steps."""
