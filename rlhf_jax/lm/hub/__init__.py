"""Reading and writing of Hugging Face model directories and PEFT adapter directories, without torch."""
