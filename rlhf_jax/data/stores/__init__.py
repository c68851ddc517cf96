"""Files of rows that are computed once, in parts, and read many times in any order."""
