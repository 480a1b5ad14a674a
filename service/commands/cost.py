"""`farsight estimate | usage | report | key`: cost estimates, usage from the ledger, and API keys."""

from __future__ import annotations

import csv
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.billing.query import DAY_S, GROUPS, HOUR_S, WIDTHS_S, group_names, moment, time_of
from service.billing.tenants import key_hash
from service.commands.terminal import console, device, fail, settings
from service.config import Config
from service.core.answer import cost_usd
from service.core.options import AttentionOptions
from service.core.request import AttentionShape

app = typer.Typer()
MAX_HOURS = 14 * 24  # in a chart by hour; longer periods are shown by day
MAX_REQUESTS = 20_000  # in the charts of single requests
EXAMPLE_URL = "postgresql+psycopg://farsight@localhost/farsight"
LEDGER_HELP = "SQLAlchemy URL; default: the ledger of the service's settings."
COLUMNS = ("requests", "tokens", "device_s", "host_s", "cost_usd", "charged_usd", "saved_usd")


@app.command()  # nine parameters: typer makes one option of each
def estimate(
    query_length: Annotated[int, typer.Option(min=1, help="Query length in tokens.")],
    key_length: Annotated[
        int | None, typer.Option(min=1, help="Key length in tokens; default: the query length.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: --heads.")] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=1024)] = 64,
    dtype: str = "float32",
    causal: Annotated[bool, typer.Option("--causal/--bidirectional")] = False,
    max_error: Annotated[
        float | None, typer.Option(min=0, max=1, help="Relative L2 error allowed; 0: exact plans only.")
    ] = None,
) -> None:
    """Estimate the cost of attention of these sizes on this device, for each plan.

    The device is calibrated first if it has not been; nothing else runs.
    """
    import torch

    from service.device import device_names
    from service.planning.attention_cost import DTYPE_BYTES
    from service.planning.attention_plan import attention_candidates
    from service.planning.profile_cache import load_or_measure

    config, kv_heads = settings(), kv_heads or heads
    if dtype not in DTYPE_BYTES:
        fail(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    if heads % kv_heads:
        fail(f"heads: expected a multiple of kv_heads ({kv_heads}), got {heads}")
    target = device(config)
    torch.set_num_threads(config.cpu_threads or os.cpu_count() or 1)
    profile = load_or_measure(target, config.cache_dir)
    hour_usd = config.hour_usd(*device_names(target))
    shape = AttentionShape(batch, heads, kv_heads, query_length, key_length or query_length, head_dim, head_dim, dtype)
    options = AttentionOptions(is_causal=causal, max_error=max_error)
    table = Table("plan", "FLOPs", "peak memory", "seconds", "USD", "", title=device_names(target)[0])
    for kind, one in attention_candidates(shape, options, profile, config).items():
        usd = cost_usd(one.predicted_s, hour_usd)
        sizes = f"{one.cost.flops:.3g}", f"{one.cost.peak_bytes / 2**20:.0f} MiB"
        table.add_row(kind.value, *sizes, f"{one.predicted_s:.3g}", f"{usd:.3g}", one.reason)
    console.print(table)


@app.command()
def usage(
    from_: Annotated[str | None, typer.Option("--from", help="Date or time (UTC); default: a day before --to.")] = None,
    to: Annotated[str | None, typer.Option(help="Exclusive; default: now.")] = None,
    group_by: Annotated[str, typer.Option(help=f"Any of {', '.join(GROUPS)}, separated by commas.")] = "tenant,model",
    ledger: Annotated[str | None, typer.Option(help=LEDGER_HELP)] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="CSV by day, tenant, model and plan, with the columns of FinOps FOCUS.")
    ] = False,
) -> None:
    """Show usage and its cost from the ledger, which running replicas update every second."""
    import sqlalchemy as sa

    from service.billing import focus
    from service.billing.ledger import LedgerError, LocalLedger

    config = settings()
    try:
        from_s, to_s = _period(from_, to)
        names = ("day", "tenant", "model", "plan") if as_csv else group_names(group_by)
        url = _url(ledger, config)
        found = LocalLedger(url).usage(from_s, to_s, names, None)
    except (ValueError, LedgerError) as error:
        fail(str(error))
    if as_csv:
        price = config.price_per_device_hour_usd
        rows = list(focus.rows(found["groups"], "day", price if isinstance(price, float) else None))
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["BilledCost"])
        writer.writeheader()
        writer.writerows(rows)
        return
    table = Table(title=f"{time_of(from_s)} to {time_of(to_s)}")
    for name in (*names, *COLUMNS):  # folded, never truncated: 1.76e-06 without its end is another amount
        table.add_column(name, overflow="fold")
    for row in found["groups"]:
        keys = [time_of(row[name]) if name in WIDTHS_S else row[name] for name in names]
        table.add_row(*keys, *(f"{row[name]:.4g}" for name in COLUMNS))
    console.print(table)
    capacity = found["capacity"]
    console.print(
        f"devices: {capacity['used_s']:.6g} s used, {capacity['idle_s']:.6g} s idle, {capacity['usd']:.6g} USD"
    )
    shown = sa.make_url(url).set(query={})  # the query may hold a password, too
    console.print(f"ledger: {shown.render_as_string(hide_password=True)}", soft_wrap=True, markup=False)


@app.command()
def report(
    ledger: Annotated[str | None, typer.Option("--from", help=LEDGER_HELP)] = None,
    since: Annotated[str | None, typer.Option(help="Date or time (UTC); default: a day before --until.")] = None,
    until: Annotated[str | None, typer.Option(help="Exclusive; default: now.")] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("farsight-cost.html"),
) -> None:
    """Write an HTML page about the ledger: spend by tenant and plan, savings compared with dense, latency, error."""
    from service.billing.ledger import LedgerError, LocalLedger

    try:
        from service.billing.report import LedgerExtract, page
    except ImportError:
        fail("the report needs matplotlib: pip install matplotlib")
    try:
        from_s, to_s = _period(since, until)
        database = LocalLedger(_url(ledger, settings()))
        slot = "hour" if to_s - from_s <= MAX_HOURS * HOUR_S else "day"
        found = database.usage(from_s, to_s, ("tenant", "plan", "outcome", slot), None)
        requests = database.sample_requests(from_s, to_s, MAX_REQUESTS)
    except (ValueError, LedgerError) as error:
        fail(str(error))
    slot_s = float(WIDTHS_S[slot])
    output.write_text(page(LedgerExtract(from_s, to_s, slot_s, found["groups"], slot, requests, found["capacity"])))
    console.print(f"report written to {output}", soft_wrap=True)


@app.command()
def key() -> None:
    """Make an API key and its hash, which goes into the tenant's key_sha256."""
    new = f"fs-{secrets.token_urlsafe(32)}"
    console.print(f"key         {new}\nkey_sha256  {key_hash(new)}", soft_wrap=True)


def _period(from_: str | None, to: str | None) -> tuple[float, float]:
    to_s = time.time() + 1.0 if to is None else moment(to)
    from_s = to_s - DAY_S if from_ is None else moment(from_)
    if not from_s < to_s:
        raise ValueError(f"start {time_of(from_s)} is not before end {time_of(to_s)}")
    return from_s, to_s


def _url(given: str | None, config: Config) -> str:
    """URL of an existing ledger: SQLite would create a missing one. Raises ValueError."""
    url = given or config.ledger
    if "://" not in url:
        raise ValueError(f"{url!r} is not a ledger URL; expected for example {EXAMPLE_URL}")
    path = url.removeprefix("sqlite:///")
    if path != url and not Path(path).exists():
        raise ValueError(f"ledger not found: {path}")
    return url
