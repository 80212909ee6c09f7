"""Results side by side: tables, plots, a page, a model card."""
