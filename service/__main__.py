"""`python -m service` is the command `farsight`."""

from service.commands.main import main

main()
