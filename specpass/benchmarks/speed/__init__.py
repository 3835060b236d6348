"""Times and bytes of every method beside floors: the run, one measurement, the tables."""
