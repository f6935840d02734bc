"""Models that jlora brings along, and the files they are read from."""
