"""Retrieval and answers from one model: what was computed to find is not computed again to write."""
