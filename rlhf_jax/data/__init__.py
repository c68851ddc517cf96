"""Data processing, from a user's files to the batches of a train step: readers, chat formats, token rows, batching."""
