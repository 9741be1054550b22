"""Callora: prepaid, pay-per-call API access with durable holds and captures."""
