"""Parts of constitutional.py."""
