"""An HTML page about the ledger: spend, savings compared with dense, latency and error over time. Needs matplotlib."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from service.billing.query import time_of

MAX_NAMES = 8  # in one chart; the rest are summed
OTHERS = "others"
PLAN_COLOURS = {"dense": "tab:blue", "chunked": "tab:green", "sparse": "tab:red"}


@dataclass(frozen=True, slots=True)
class LedgerExtract:
    """What the page shows: sums by slot of time (an hour or a day), and single requests of recent days."""

    from_s: float
    to_s: float
    slot_s: float
    slots: Sequence[Mapping[str, Any]]  # `Ledger.usage` by tenant, plan, outcome and hour or day
    slot_name: str  # "hour" or "day"
    requests: Sequence[Mapping[str, Any]]  # at_s, plan, outcome, total_s, queue_s, error_upper
    capacity: Mapping[str, float]


def page(ledger: LedgerExtract) -> str:
    """HTML with the charts embedded as images."""
    charts = [
        ("Spend by tenant", _stacked(ledger, "tenant", "cost_usd", "USD")),
        ("Spend by plan", _stacked(ledger, "plan", "cost_usd", "USD")),
        ("Spent, and saved compared with dense", _saved(ledger)),
        ("Latency of single requests", _latency(ledger)),
        ("Measured error of sparse answers (upper bound)", _errors(ledger)),
        ("Requests by outcome", _stacked(ledger, "outcome", "requests", "requests")),
    ]
    figures = "\n".join(
        f'<figure><figcaption>{escape(title)}</figcaption><img alt="{escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}"></figure>'
        for title, image in charts
        if image is not None
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Farsight cost report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .25rem .8rem; text-align: right }}
th {{ border-bottom: 2px solid #888 }} td:first-child, th:first-child {{ text-align: left }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} figcaption {{ font-weight: 600 }} img {{ width: 100% }}
</style></head><body>
<h1>Cost report</h1><p>{escape(time_of(ledger.from_s))} to {escape(time_of(ledger.to_s))}</p>
{_summary(ledger)}{_tenants(ledger)}<main>
{figures}
</main></body></html>
"""


def _summary(ledger: LedgerExtract) -> str:
    used = sum(row["cost_usd"] for row in ledger.slots)
    charged = sum(row["charged_usd"] for row in ledger.slots)
    saved = sum(row["saved_usd"] for row in ledger.slots)
    count = sum(row["requests"] for row in ledger.slots)
    failed = sum(row["requests"] for row in ledger.slots if row["outcome"] != "ok")
    device_s = ledger.capacity["used_s"] + ledger.capacity["idle_s"]
    rows = [
        ("requests accepted", f"{count:,}"),
        ("accepted, not answered", f"{failed:,}"),
        ("used", f"{used:.6g} USD"),
        ("charged to budgets", f"{charged:.6g} USD"),
        ("devices, including idle time", f"{ledger.capacity['usd']:.6g} USD"),
        ("utilization of the devices", f"{ledger.capacity['used_s'] / device_s:.1%}" if device_s else "unknown"),
        ("saved compared with dense (predicted)", f"{saved:.6g} USD"),
    ]
    return "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows) + "</table>"


def _tenants(ledger: LedgerExtract) -> str:
    names = ("requests", "tokens", "device_s", "host_s", "cost_usd", "charged_usd", "saved_usd")
    sums: dict[str, dict[str, float]] = {}
    for row in ledger.slots:
        tenant_sums = sums.setdefault(row["tenant"], dict.fromkeys(names, 0.0))
        for name in names:
            tenant_sums[name] += row[name]
    head = "".join(f"<th>{name}</th>" for name in ("tenant", *names))
    body = "".join(
        f"<tr><td>{escape(tenant)}</td>" + "".join(f"<td>{row[name]:,.6g}</td>" for name in names) + "</tr>"
        for tenant, row in sorted(sums.items(), key=lambda item: -item[1]["cost_usd"])
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _stacked(ledger: LedgerExtract, by: str, value: str, unit: str) -> bytes | None:
    """Stacked bars of a column over time, one colour for each of the largest names."""
    totals: dict[str, float] = {}
    for row in ledger.slots:
        totals[row[by]] = totals.get(row[by], 0.0) + row[value]
    names = sorted(totals, key=lambda name: -totals[name])
    shown = names[:MAX_NAMES]
    times = sorted({row[ledger.slot_name] for row in ledger.slots})
    columns = {at_s: index for index, at_s in enumerate(times)}
    heights = {name: np.zeros(len(times)) for name in (*shown, *([OTHERS] if len(names) > len(shown) else []))}
    for row in ledger.slots:
        name = row[by] if row[by] in heights else OTHERS
        heights[name][columns[row[ledger.slot_name]]] += row[value]
    if not times:
        return None
    figure, axes = _figure(unit)
    bottom = np.zeros(len(times))
    for name, height in heights.items():
        colour = PLAN_COLOURS.get(name) if by == "plan" else None
        axes.bar(_days(times), height, ledger.slot_s / 86400, bottom, align="edge", label=name, color=colour)
        bottom += height
    axes.legend(fontsize=8)
    return _png(figure)


def _saved(ledger: LedgerExtract) -> bytes | None:
    times = sorted({row[ledger.slot_name] for row in ledger.slots})
    if not times:
        return None
    figure, axes = _figure("USD, cumulative")
    for name, label in (("cost_usd", "spent"), ("saved_usd", "saved compared with dense (predicted)")):
        sums = [sum(row[name] for row in ledger.slots if row[ledger.slot_name] == at_s) for at_s in times]
        ends = [at_s + ledger.slot_s for at_s in times]
        axes.plot(_days([times[0], *ends]), np.cumsum([0.0, *sums]), label=label)
    axes.legend(fontsize=8)
    return _png(figure)


def _latency(ledger: LedgerExtract) -> bytes | None:
    answered = [row for row in ledger.requests if row["outcome"] == "ok"]
    if not answered:
        return None
    figure, axes = _figure("seconds")
    width_s = max(1.0, (ledger.to_s - ledger.from_s) / 60)
    slots: dict[int, list[float]] = {}
    for row in answered:
        slots.setdefault(int((row["at_s"] - ledger.from_s) // width_s), []).append(row["total_s"])
    times = [ledger.from_s + (slot + 0.5) * width_s for slot in sorted(slots)]
    for share, label in ((50, "median"), (95, "95 %"), (99, "99 %")):
        axes.plot(_days(times), [np.percentile(slots[slot], share) for slot in sorted(slots)], "o-", ms=3, label=label)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return _png(figure)


def _errors(ledger: LedgerExtract) -> bytes | None:
    measured = [row for row in ledger.requests if row["error_upper"]]
    if not measured:
        return None
    figure, axes = _figure("relative L2 error")
    axes.plot(_days([row["at_s"] for row in measured]), [row["error_upper"] for row in measured], "o", ms=3)
    axes.set_yscale("log")
    return _png(figure)


def _figure(unit: str) -> tuple[Figure, Axes]:
    figure = Figure((7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(unit)
    locator = AutoDateLocator()  # type: ignore[no-untyped-call]
    axes.xaxis_date()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _days(seconds: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Days since 1970, matplotlib's unit of time. [T] -> [T]"""
    return np.asarray(seconds, dtype=np.float64) / 86400


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, dpi=120)
    return target.getvalue()
