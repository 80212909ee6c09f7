"""`python -m gemify`."""

from gemify.cli.main import main

main()
