"""What a kind of work is: prepared, priced, planned, batched, run, and measured. The engine knows no other.

Attention and forward passes are two workloads. A request passes through the verbs in this order:

    prepare -> price -> choose -> (queue) -> run -> measured
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from service.core.answer import ErrorReport, LayerReport
from service.core.plan import Plan, PlanKind
from service.core.request import Request
from service.planning.correction import PredictionCorrector
from service.planning.planner import Candidates
from service.telemetry.request_record import RequestRecord

if TYPE_CHECKING:
    import torch

Checkpoint = Callable[[], None]  # called between blocks of work; raises to stop it


@dataclass(frozen=True, slots=True)
class InputCounts:
    """What a request's inputs amount to."""

    tokens: int  # that are computed
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    chunks: int = 0  # that inputs over the model's length were cut into


class Prepared(Protocol):
    """A request, validated against what it is for, ready to be priced."""

    @property
    def request(self) -> Request: ...
    @property
    def counts(self) -> InputCounts: ...
    @property
    def tokenized_s(self) -> float | None: ...  # when tokenising was done; None: there is nothing to tokenise


RequestT = TypeVar("RequestT", bound=Request)
PreparedT = TypeVar("PreparedT", bound=Prepared)
PreparedT_co = TypeVar("PreparedT_co", bound=Prepared, covariant=True)


@dataclass(frozen=True, slots=True)
class PlannedWork(Generic[PreparedT_co]):
    """A prepared request with its plan: what a workload runs."""

    prepared: PreparedT_co
    plan: Plan
    exact_kind: PlanKind  # what replaces a sparse result that errs too much
    key: Hashable = None  # works with equal keys may share a run
    is_audit: bool = False  # an exact run of what was answered sparse


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the device computed for one request."""

    tensors: Mapping[str, torch.Tensor]
    plan: Plan  # that produced them
    error: ErrorReport
    pairs_scored: int
    density: float | None = None  # share of pairs that sparse attention scored
    layers: tuple[LayerReport, ...] = ()  # every attention call of a sparse pass
    shows_layers: bool = False  # the caller asked for each of them
    details: Any = None  # what the task reports besides tensors, as JSON
    sampled: Sequence[torch.Tensor] = ()  # rows of the last hidden states, of a sparse pass and of its audit
    padding: float | None = None  # positions computed for nothing, as a share of the pass's tokens


@dataclass(frozen=True, slots=True)
class MeasuredWork:
    """Pairs and FLOPs that one request used, and what exact attention would have used."""

    pairs_scored: int
    pairs_dense: int
    flops: int
    flops_dense: int


class Workload(ABC, Generic[RequestT, PreparedT]):
    """One kind of work. `prepare` and `price` run on the event loop, `run` on the device thread."""

    @abstractmethod
    async def prepare(self, request: RequestT, deadline_s: float, record: RequestRecord) -> PreparedT:
        """Validate and tokenise. Raises FarsightError; `deadline_s` is on the engine's clock."""

    @abstractmethod
    async def price(self, prepared: PreparedT, record: RequestRecord, *, everything: bool = False) -> Candidates:
        """The plans that may be chosen, priced; with `everything` also those that only apply."""

    @abstractmethod
    def choose(self, prepared: PreparedT, priced: Candidates, corrector: PredictionCorrector) -> PlannedWork[PreparedT]:
        """The fastest of `priced` that fits, with its batch key. Raises FarsightError if none does."""

    @abstractmethod
    def run(self, works: Sequence[PlannedWork[PreparedT]], checkpoint: Checkpoint) -> list[Outcome]:
        """Compute works of one batch key together; one outcome each, in order."""

    @abstractmethod
    def with_less_memory(self, work: PlannedWork[PreparedT]) -> PlannedWork[PreparedT] | None:
        """The same work in smaller parts, after the device ran out of memory; None if it cannot be made smaller."""

    @abstractmethod
    def measured(self, work: PlannedWork[PreparedT], outcome: Outcome) -> MeasuredWork:
        """Pairs and FLOPs by what was really scored."""

    @abstractmethod
    def label(self, request: RequestT) -> str:
        """The model's name as a metric label: only names that exist, so that callers cannot make new series."""

    def observe(self, works: Sequence[PlannedWork[PreparedT]], device_s: float) -> None:
        """A run of these works succeeded and took so long."""
