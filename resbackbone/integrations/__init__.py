"""Adapters that put the library into other frameworks; each imports its host, and nothing imports them."""
