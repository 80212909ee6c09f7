"""Room A: the method itself (arXiv 2506.04344) on plain torch. Knows no model library, no files, no devices."""
