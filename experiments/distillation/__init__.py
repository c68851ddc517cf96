"""Parts of distill.py: the teacher's file, its rows, the student, and the built-in world."""
