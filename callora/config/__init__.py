"""Settings: from environment variables to values that agree with one another, a file a step."""
