"""Answers of every method, scored: methods, the run, the summary, and its verification."""
