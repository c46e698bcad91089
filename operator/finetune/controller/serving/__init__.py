"""What a replica serves over HTTP: live progress from pods, health, metrics."""
