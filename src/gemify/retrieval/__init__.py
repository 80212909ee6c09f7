"""Documents to passages, passages to an index, an index to search results."""
