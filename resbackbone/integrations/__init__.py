"""Adapters for other frameworks; each imports its host, and no other module imports them."""
