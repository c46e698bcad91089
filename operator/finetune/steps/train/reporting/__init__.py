"""What people get to see of a run: while it trains, and in training.json afterwards."""
