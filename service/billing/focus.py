"""Rows with the columns of the FinOps FOCUS specification 1.2, for cost tools; columns of Farsight's own are `x_`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.billing.query import WIDTHS_S, time_of


def rows(groups: list[dict[str, Any]], period: str, hour_usd: float | None) -> Iterator[dict[str, Any]]:
    """One charge for each group of `Ledger.usage` by tenant, model, plan and `period` ("hour" or "day").

    `BilledCost` is what was charged to the tenant's budget: failures of the service cost nothing. `EffectiveCost` is
    the cost of all device time and host work used. `hour_usd`: price of a device hour, None if devices have different
    prices.
    """
    for group in groups:
        begin_s = float(group[period])
        yield {
            "BilledCost": group["charged_usd"],
            "BillingCurrency": "USD",
            "ChargeCategory": "Usage",
            "ChargeDescription": f"{group['model']} ({group['plan']} attention)",
            "ChargePeriodEnd": time_of(begin_s + WIDTHS_S[period]),
            "ChargePeriodStart": time_of(begin_s),
            "ConsumedQuantity": group["device_s"],
            "ConsumedUnit": "Seconds",
            "EffectiveCost": group["cost_usd"],
            "ListCost": group["cost_usd"],
            "ListUnitPrice": None if hour_usd is None else hour_usd / 3600,
            "PricingQuantity": group["device_s"],
            "PricingUnit": "Seconds",
            "ProviderName": "farsight",
            "ResourceId": group["model"],
            "ServiceCategory": "AI and Machine Learning",
            "ServiceName": "Farsight",
            "SubAccountId": group["tenant"],
            "x_Flops": group["flops"],
            "x_FlopsDense": group["flops_dense"],
            "x_HostCost": group["host_usd"],
            "x_HostSeconds": group["host_s"],
            "x_Joules": group["joules"],
            "x_Plan": group["plan"],
            "x_Requests": group["requests"],
            "x_SavedCost": group["saved_usd"],
            "x_Tokens": group["tokens"],
        }
