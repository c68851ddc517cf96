"""Everything between a user's files and the batches of a train step: readers, chat formats, token rows and batching."""
