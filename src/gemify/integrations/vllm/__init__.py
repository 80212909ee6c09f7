"""A GEM inside vLLM: one engine that generates and embeds."""
