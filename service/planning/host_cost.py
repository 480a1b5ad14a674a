"""Predicted seconds of host work, from its size: first guesses, corrected by what such work took."""

from __future__ import annotations

from service.core.host_work import HostAsk, HostKind
from service.planning.correction import PredictionCorrector

# seconds of one core for each byte (pixel of an image, millisecond of audio), and for each item: as one machine took
SECONDS = {
    HostKind.PARSE: (2e-9, 0.0),
    HostKind.PARSE_JSON: (3e-8, 0.0),
    HostKind.TEXT: (1.5e-6, 2e-5),
    HostKind.IMAGE: (4e-8, 2e-3),
    HostKind.AUDIO: (2e-6, 2e-2),
    HostKind.PRICE: (0.0, 1e-5),
    HostKind.RENDER: (2e-8, 0.0),
}


class HostCost:
    """Predicts host work of one replica. Called on the event loop."""

    def __init__(self) -> None:
        # one of each kind: what a corrector learns of the machine would carry the errors of one kind to the others
        self._correctors = {kind: PredictionCorrector() for kind in HostKind}

    def predicted_s(self, ask: HostAsk) -> float:
        """Seconds of one core."""
        return _first_guess_s(ask) * self._correctors[ask.kind].factor((ask.model,))

    def learn(self, ask: HostAsk, used_s: float) -> None:
        """Work that succeeded took so long."""
        self._correctors[ask.kind].learn((ask.model,), _first_guess_s(ask), used_s)


def _first_guess_s(ask: HostAsk) -> float:
    each_s, item_s = SECONDS[ask.kind]
    return ask.size * each_s + ask.items * item_s
