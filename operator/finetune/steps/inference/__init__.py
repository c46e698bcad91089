"""What a loaded model says."""
