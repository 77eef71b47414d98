"""What every room may use: digests, named randomness, plug-ins, redaction, images as bytes."""
