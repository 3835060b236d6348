"""Attention of a prompt whose queries read chosen columns and their own last ones."""
