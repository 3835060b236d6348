"""Scores by what a row's output loses without a column."""
