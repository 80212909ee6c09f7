"""The model at work for many askers at once: writing and embedding, from one set of weights."""
