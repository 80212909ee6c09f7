"""The tables of the GEM paper, trained and measured again."""
