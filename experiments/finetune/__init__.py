"""Parts of the commands that train and evaluate a user's own models on their own data."""
