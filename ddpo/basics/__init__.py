"""What every room may use: digests, named randomness, plug-ins, redaction, image encoding."""
