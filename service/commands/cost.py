"""`farsight estimate | usage | report | key`: what a request would cost, what was spent, and who may spend."""

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

from service.billing.query import (
    DAY_S,
    HOUR_S,
    WIDTHS_S,
    group_names,
    moment,
    time_of,
)
from service.billing.tenants import key_hash
from service.commands.terminal import (
    console,
    device,
    fail,
    settings,
)
from service.config import Config
from service.core.answer import cost_usd
from service.core.options import AttentionOptions
from service.core.request import AttentionShape

app = typer.Typer()
MOST_HOURS = 14 * 24  # of a chart; more are days
MOST_SINGLES = 20_000
COLUMNS = ("requests", "tokens", "device_s", "cost_usd", "charged_usd", "saved_usd")


@app.command()
def estimate(
    query_length: Annotated[int, typer.Option(min=1, help="Tokens that look.")],
    key_length: Annotated[int | None, typer.Option(min=1, help="Tokens that are looked at; default as many.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: heads.")] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=1024)] = 64,
    dtype: str = "float32",
    causal: Annotated[bool, typer.Option("--causal/--bidirectional")] = False,
    max_error: Annotated[float | None, typer.Option(min=0, max=1, help="0: exact only.")] = None,
) -> None:
    """Price attention of these sizes on this device, by plan. Nothing runs, but a calibration where there is none."""
    import torch

    from service.device import device_names
    from service.planning.attention_cost import DTYPE_BYTES
    from service.planning.attention_plan import attention_candidates
    from service.planning.profile_cache import load_or_measure

    config, kv_heads = settings(), kv_heads or heads
    if dtype not in DTYPE_BYTES or heads % kv_heads:
        fail(f"dtype is one of {', '.join(DTYPE_BYTES)}, and heads a multiple of kv_heads")
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
    from_: Annotated[str | None, typer.Option("--from", help="Date or time (UTC); default a day before --to.")] = None,
    to: Annotated[str | None, typer.Option(help="Not included; default now.")] = None,
    group_by: Annotated[str, typer.Option(help="tenant, endpoint, model, plan, outcome, hour, day.")] = "tenant,model",
    ledger: Annotated[str | None, typer.Option(help="SQLAlchemy URL; default FARSIGHT_LEDGER_URL's.")] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="By day, tenant, model and plan, with the columns of FinOps FOCUS.")
    ] = False,
) -> None:
    """What was used and what it cost, from the ledger. Running replicas write to it every second."""
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
    for name in (*names, *COLUMNS):  # folded, never cut: 1.76e-06 without its end is another amount
        table.add_column(name, overflow="fold")
    for row in found["groups"]:
        keys = [time_of(row[name]) if name in WIDTHS_S else row[name] for name in names]
        table.add_row(*keys, *(f"{row[name]:.4g}" for name in COLUMNS))
    console.print(table)
    capacity = found["capacity"]
    console.print(
        f"devices: {capacity['used_s']:.6g} s used, {capacity['idle_s']:.6g} s idle, {capacity['usd']:.6g} USD"
    )
    shown = sa.make_url(url).set(query={})  # which may have a password, too
    console.print(f"ledger: {shown.render_as_string(hide_password=True)}", soft_wrap=True, markup=False)


@app.command()
def report(
    ledger: Annotated[str | None, typer.Option("--from", help="SQLAlchemy URL; default FARSIGHT_LEDGER_URL's.")] = None,
    since: Annotated[str | None, typer.Option(help="Date or time (UTC); default a day before --until.")] = None,
    until: Annotated[str | None, typer.Option(help="Not included; default now.")] = None,
    output: Annotated[Path, typer.Option(help="HTML.")] = Path("farsight-cost.html"),
) -> None:
    """One page of the ledger: spend over time by tenant and plan, saved against dense, latency, error."""
    from service.billing.ledger import LedgerError, LocalLedger

    try:
        from service.billing.report import LedgerExtract, page
    except ImportError:
        fail("the report is drawn by matplotlib: pip install matplotlib")
    try:
        from_s, to_s = _period(since, until)
        bank = LocalLedger(_url(ledger, settings()))
        slot = "hour" if to_s - from_s <= MOST_HOURS * HOUR_S else "day"
        found = bank.usage(from_s, to_s, ("tenant", "plan", "outcome", slot), None)
        singles = bank.singles(from_s, to_s, MOST_SINGLES)
    except (ValueError, LedgerError) as error:
        fail(str(error))
    slot_s = float(WIDTHS_S[slot])
    output.write_text(page(LedgerExtract(from_s, to_s, slot_s, found["groups"], slot, singles, found["capacity"])))
    console.print(f"written to {output}", soft_wrap=True)


@app.command()
def key() -> None:
    """A new API key, and the hash of it that a tenant is configured with."""
    new = f"fs-{secrets.token_urlsafe(32)}"
    console.print(f"key         {new}\nkey_sha256  {key_hash(new)}", soft_wrap=True)


def _period(from_: str | None, to: str | None) -> tuple[float, float]:
    to_s = time.time() + 1.0 if to is None else moment(to)
    from_s = to_s - DAY_S if from_ is None else moment(from_)
    if not from_s < to_s:
        raise ValueError(f"{time_of(from_s)} is not before {time_of(to_s)}")
    return from_s, to_s


def _url(given: str | None, config: Config) -> str:
    """Of a ledger that is there: SQLite would make a new one."""
    url = given or config.ledger
    if "://" not in url:
        raise ValueError(f"{url!r} is no URL of a ledger, such as {config.ledger}")
    path = url.removeprefix("sqlite:///")
    if path != url and not Path(path).exists():
        raise ValueError(f"there is no ledger at {path}")
    return url
