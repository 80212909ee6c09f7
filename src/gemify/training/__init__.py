"""Training: recipes, batches, losses, and runs on transformers' Trainer."""
