"""Work for the host's cores next to a device: reading what a request sends, and writing what it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from service.core.options import Priority


class HostKind(StrEnum):
    """What is done; a metric label."""

    PARSE = "parse"  # a binary body into a request
    PARSE_JSON = "parse_json"
    TEXT = "text"  # texts into tokens
    IMAGE = "image"  # files into pixels
    AUDIO = "audio"  # files into spectrograms
    PRICE = "price"  # thousands of lengths into a plan
    RENDER = "render"  # an answer into a body


OWED = frozenset({HostKind.PRICE, HostKind.RENDER})  # to a request that was read: neither refused nor charged


@dataclass(frozen=True, slots=True)
class HostAsk:
    """Host work that a caller asks for."""

    kind: HostKind
    size: int  # bytes; pixels of images; milliseconds of audio
    tenant: str
    items: int = 1  # texts or files
    priority: Priority = Priority.INTERACTIVE
    model: str = ""
    deadline_s: float = math.inf  # on the engine's clock


@dataclass(frozen=True, slots=True)
class HostUse:
    """What reading one request has used so far."""

    tenant: str
    seconds: float  # of one core
    usd: float
