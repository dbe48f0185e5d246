"""The command line: one small file per verb; everything heavy is imported inside the functions."""
