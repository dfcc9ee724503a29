"""What compression costs in quality: suites that read the same inputs dense and compressed."""
