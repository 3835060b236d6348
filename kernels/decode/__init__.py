"""One new query per sequence against the slots in use."""
