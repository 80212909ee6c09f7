"""The model: a base language model with special tokens, that embeds and generates."""
