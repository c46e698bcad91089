"""Rows of data: opened where the spec says that they are, and read in the formats that datasets come in."""
