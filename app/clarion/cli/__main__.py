"""`python -m clarion.cli` is `clarion`."""

from clarion.cli import main

main()
