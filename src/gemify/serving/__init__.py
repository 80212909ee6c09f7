"""One server, both jobs: chat and embeddings from one set of weights."""
