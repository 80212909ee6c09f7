"""Paired timings of what gemify does against what one does without it."""
