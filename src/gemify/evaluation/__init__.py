"""What a model is worth on both sides: embedding tasks, language benchmarks, recovery, cost."""
