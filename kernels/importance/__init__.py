"""Query rows against all keys, reduced to one score a column."""
