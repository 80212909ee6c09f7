"""`python -m gemify`."""

from gemify.cli import main

main()
