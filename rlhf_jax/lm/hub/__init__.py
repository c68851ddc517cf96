"""Hugging Face model directories and PEFT adapter directories, read and written without torch."""
