"""Shared helpers below everything else: validation, logging, atomic writes, facts about the processor."""
