"""A corpus larger than memory: files of rows in, shards of vectors out, on one machine or many."""
