"""Farsight with a first-in, first-out queue, as other servers have: what fair scheduling is compared with."""

from service.commands.serve import start, with_models
from service.commands.terminal import settings

if __name__ == "__main__":
    start(with_models(settings(), demo=True), order="arrival")
