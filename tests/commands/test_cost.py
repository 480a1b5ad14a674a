"""`farsight estimate | usage | report | key` on the command line."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.billing.ledger import LocalLedger
from service.commands.main import app
from tests.billing.common import row

HOUR = 1_795_215_600.0  # 2026-11-20T23:00:00Z


def run(*arguments: str, code: int = 0, **environment: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **environment})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    """Two days of two tenants."""
    url, draw = f"sqlite:///{tmp_path}/ledger.sqlite", random.Random(0)
    rows: list[dict[str, Any]] = []
    for index in range(2000):
        plan = draw.choice(["dense", "dense", "sparse"])
        device_s = draw.lognormvariate(-3, 1)
        rows.append(
            row(
                journal="j",
                number=index,
                at_s=HOUR + draw.random() * 86_400,
                tenant=draw.choice(["shop", "shop", "lab"]),
                model=draw.choice(["attention", "mini"]),
                plan=plan,
                outcome="ok" if draw.random() < 0.98 else "deadline",
                device_s=device_s,
                cost_usd=device_s / 1000,
                charged_usd=device_s / 1000,
                saved_usd=device_s / 500 if plan == "sparse" else 0.0,
                total_s=device_s * draw.lognormvariate(0.5, 0.5),
                error_upper=draw.lognormvariate(-5, 0.3) if plan == "sparse" else None,
            )
        )
    used_s = sum(row["device_s"] for row in rows)
    stretch = {"journal": "j", "number": 9999, "at_s": HOUR + 80_000, "used_s": used_s, "idle_s": used_s, "usd": 1.0}
    LocalLedger(url).record(rows, [stretch])
    return url


def test_usage_is_a_table_by_the_given_groups(ledger: str) -> None:
    arguments = "usage", "--ledger", ledger, "--from", "2026-11-20", "--to", "2026-11-22"
    by_tenant = run(*arguments, "--group-by", "tenant")
    assert re.search(r"lab +│ +\d+ ", by_tenant)
    assert "1 USD" in by_tenant
    assert "2026-11-21T00:00:00Z" in run(*arguments, "--group-by", "day,plan")
    assert "expected any of tenant" in run(*arguments, "--group-by", "user", code=1)
    assert "expected a date" in run("usage", "--ledger", ledger, "--from", "monday", code=1)
    assert "not a ledger URL; expected for example postgresql+psycopg://" in run(
        "report", "--from", "2026-11-01", code=1
    )
    narrow = run(*arguments, "--group-by", "tenant,model", COLUMNS="60")
    assert "…" not in narrow
    assert "ledger not found" in run("usage", "--ledger", "sqlite:////tmp/none/none.sqlite", code=1)


def test_csv_has_the_columns_of_focus_and_all_charges(ledger: str) -> None:
    text = run("usage", "--ledger", ledger, "--from", "2026-11-20", "--to", "2026-11-22", "--csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {"BilledCost", "ChargePeriodStart", "ConsumedQuantity", "ServiceName", "SubAccountId", "x_Tokens"} <= set(
        rows[0]
    )
    assert {row["ChargePeriodStart"] for row in rows} == {"2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z"}
    assert {row["SubAccountId"] for row in rows} == {"shop", "lab"}
    found = LocalLedger(ledger).usage(0, 1e12, (), None)["groups"][0]
    assert sum(float(row["BilledCost"]) for row in rows) == pytest.approx(found["charged_usd"])
    assert sum(int(row["x_Requests"]) for row in rows) == 2000


def test_the_report_shows_the_sums_of_the_ledger(ledger: str, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    run("report", "--from", ledger, "--since", "2026-11-20", "--until", "2026-11-22", "--output", str(output))
    page = output.read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "<td>2,000</td>" in page
    used = LocalLedger(ledger).usage(0, 1e12, (), None)["groups"][0]["cost_usd"]
    assert f"{used:.6g} USD" in page
    assert "<td>50.0%</td>" in page
    assert "http" not in page.replace("http-equiv", "")  # a single file that fetches nothing


def test_a_report_of_an_empty_period_works(ledger: str, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    run("report", "--from", ledger, "--since", "2020-01-01", "--until", "2020-01-02", "--output", str(output))
    assert "<td>0</td>" in output.read_text()
    arguments = "report", "--from", ledger, "--since", "2020-01-02", "--until", "2020-01-01"
    assert "is not before" in run(*arguments, code=1)


def test_an_estimate_lists_every_plan() -> None:
    text = run("estimate", "--query-length", "100000", "--causal", FARSIGHT_DEVICE="cpu")
    for kind in ("dense", "chunked", "sparse"):
        assert kind in text
    assert "1.02e+13" in text
    assert "heads: expected a multiple of kv_heads (4), got 6" in run(
        "estimate", "--query-length", "10", "--heads", "6", "--kv-heads", "4", code=1
    )


def test_a_key_is_printed_with_its_hash() -> None:
    text = run("key")
    key, digest = (line.split()[1] for line in text.splitlines())
    assert hashlib.sha256(key.encode()).hexdigest() == digest
    assert len(key) > 40
    assert run("key") != text
