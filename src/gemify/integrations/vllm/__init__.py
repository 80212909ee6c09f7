"""A GEM inside vLLM."""
