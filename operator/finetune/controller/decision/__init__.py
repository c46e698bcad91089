"""From the state of one job, as last seen, to what shall be written. Pure: no I/O, no clock, no chance."""
