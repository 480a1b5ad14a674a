"""`python -m service` is the command `farsight`."""

from service.cli import main

main()
