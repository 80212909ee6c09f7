"""Files, rows, signals: what every room stands on. It knows nothing of models."""
