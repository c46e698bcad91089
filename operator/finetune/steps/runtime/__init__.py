"""What every step has around it, whatever it does: failures, progress, the request to stop, disk and memory."""
