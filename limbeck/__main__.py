"""`python -m limbeck` is the command."""

from limbeck.cli import main

main()
