"""What may be read without going through an actor, a file a noun. HTTP reads the store through these alone."""
