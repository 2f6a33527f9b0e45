"""What is counted while the daemon serves."""
