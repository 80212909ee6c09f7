"""The method itself (GEM, arXiv 2506.04344) on plain torch: no model library, no files, no devices."""
