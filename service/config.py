"""The frozen configuration, cross-checked at start. Environment variables: FARSIGHT_<FIELD>, with JSON for lists."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # USD for a device hour

GIB = 1024**3
MIB = 1024**2


class ModelConfig(BaseModel):
    """A local Hugging Face directory (config.json, safetensors, tokenizer.json) and how it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
    path: str | None = Field(None, description="Directory of the model; alternative to `package`.")
    package: str | None = Field(None, description="Installed Python package with the model in its folder `model/`.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int | None = Field(None, ge=1, description="Tokens per input; default: from the model's files.")
    task: Literal["embed", "classify", "rerank", "score"] | None = Field(None, description="Default: from the files.")
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None, description="Pooling of embeddings; default: from sentence-transformers' files, else mean."
    )
    rope_scaling: dict[str, Any] | None = Field(
        None, description='Rotary scaling for longer inputs, as in config.json: {"rope_type": "yarn", "factor": 4.0}.'
    )
    required: bool = Field(True, description="`/readyz` fails while this model is not served.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.package is None):
            raise ValueError(f"model {self.name!r}: expected exactly one of path and package")
        if self.name == "attention":
            raise ValueError("model name 'attention' is reserved for the attention endpoint")
        return self


class Budget(BaseModel):
    """What a tenant may spend: an amount (`usd` or `device_s`) per period, refilled evenly up to `burst`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    usd: float | None = Field(None, gt=0, allow_inf_nan=False)
    device_s: float | None = Field(None, gt=0, allow_inf_nan=False, description="Device time in seconds.")
    per: Literal["minute", "hour", "day"]
    burst: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Capacity; default: the amount of a whole period."
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if (self.usd is None) == (self.device_s is None):
            raise ValueError(
                f"budget: expected exactly one of usd and device_s, got {'none' if self.usd is None else 'both'}"
            )
        return self

    @property
    def unit(self) -> Literal["usd", "device_s"]:
        return "usd" if self.device_s is None else "device_s"

    @property
    def amount(self) -> float:
        return self.usd or self.device_s or 0.0

    @property
    def name(self) -> str:
        return f"{self.unit}/{self.per}"

    @property
    def period_s(self) -> float:
        return {"minute": 60.0, "hour": 3600.0, "day": 86400.0}[self.per]

    @property
    def capacity(self) -> float:
        return self.burst or self.amount


class TenantConfig(BaseModel):
    """A tenant: its API keys, its share of the device and its budgets."""

    # errors must not show the input: it may be a key instead of its hash
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    key_sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        (), description="SHA-256 of each API key, in hex; `farsight key` makes a key and its hash. Keys are not stored."
    )
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Share of the device, relative to other tenants' weights."
    )
    budgets: tuple[Budget, ...] = ()
    is_admin: bool = Field(False, description="Sees all tenants' usage, reads /metrics, loads models.")

    @model_validator(mode="after")
    def _distinct(self) -> TenantConfig:
        names = [budget.name for budget in self.budgets]
        if len(set(names)) != len(names):
            raise ValueError(f"tenant {self.name!r}: budgets must differ in unit or period, got {names}")
        return self


class Config(BaseSettings):
    """All settings; immutable after the start."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="FARSIGHT_", hide_input_in_errors=True)

    # addresses and directories
    host: str = "127.0.0.1"
    http_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int = Field(9000, ge=1, le=65535)
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(9464, ge=1, le=65535)
    haproxy_metrics_port: int = Field(9101, ge=1, le=65535)
    haproxy_stats_port: int = Field(8404, ge=1, le=65535)
    replica_port_base: int = Field(
        25000,
        ge=1024,
        le=32568,
        description="First of the 200 ports (100 HTTP, 100 gRPC) on which replicas listen behind HAProxy. Two services "
        "on one machine need different ranges: otherwise Ray lets them share ports and mixes their traffic.",
    )
    state_dir: Path = Field(
        Path("~/.local/state/farsight"),
        description="Directory of the ledger, its write-ahead logs and the metric files; on a persistent disk.",
    )
    cache_dir: Path = Field(Path("~/.cache/farsight"), description="Directory of the measured speed of this device.")

    # models, replicas and devices
    models: tuple[ModelConfig, ...] = ()
    model_control: bool = Field(False, description="Callers may load and unload models.")
    model_repository: Path | None = Field(None, description="Directory with models that can be loaded by folder name.")
    replicas: int = Field(1, ge=1, description="Number of replicas; the minimum if max_replicas is set.")
    max_replicas: int | None = Field(None, ge=1, description="Maximum, reached under load; default: `replicas`.")
    upscale_delay_s: float = Field(10.0, ge=0, description="Seconds of sustained load before adding a replica.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Seconds of lower load before removing a replica.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: int | None = Field(None, ge=1, description="Threads that a replica computes with; default: all cores.")

    # limits, all checked before memory is allocated
    max_request_bytes: int = Field(256 * MIB, ge=1024)
    max_json_bytes: int = Field(32 * MIB, ge=1024, description="Parsed JSON numbers take ~16x the bytes of their text.")
    max_inflight_bytes: int = Field(2 * GIB, ge=1024, description="Request bodies that a replica holds at any time.")
    max_weights_bytes: int = Field(64 * MIB, ge=0, description="Size of a returned attention-weight tensor.")
    max_peak_bytes: int | None = Field(None, description="Predicted peak of a request; default: 60 % of free memory.")
    max_texts: int = Field(2048, ge=1, description="Inputs per request.")
    max_images: int = Field(64, ge=1, description="Images per request; decoding a large one takes up to ~1 GB.")
    max_audio_windows: int = Field(60, ge=1, description="Windows of 30 s of audio per request, over all its files.")
    max_text_bytes: int = Field(1 * MIB, ge=1, description="Longer texts are refused before they are tokenised.")

    # scheduling
    batch_budget_s: float = Field(
        0.2,
        gt=0,
        description="Predicted device time up to which a batch is filled. With 32 clients of a small transformer on 2 "
        "cores, 0.05 gave 60 % of the throughput of larger values: other threads disturb small matrix products more.",
    )
    max_batch_tokens: int = Field(16384, ge=1, description="Tokens per packed forward pass.")
    max_queue_s: float = Field(
        30.0,
        gt=0,
        description="Predicted device seconds of work that may be ahead of a request; work of other tenants counts as "
        "far as their shares let it run first. Requests that have waited longer than this run first.",
    )
    default_timeout_s: float = Field(300.0, gt=0)

    # attention
    block_size: int = Field(128, ge=16, le=1024)
    max_error: float = Field(0.02, ge=0, le=1, description="Default for attention requests that do not set it.")
    model_max_error: float = Field(0.05, ge=0, le=1, description="The same of forward passes: of their last state.")
    epsilon: float = Field(0.4, gt=0, le=1, description="Largest risk of a block that is not read, at max_error 0.02.")
    audit_rows: int = Field(59, ge=8, le=4096, description="Rows per head; 59 = 95 % of rows at 95 % confidence.")
    output_audit_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of sparse forward answers that run again exactly on an idle device, to export the error of "
        "their outputs.",
    )
    sparse_min_tokens: int = Field(6144, ge=256, description="Number of keys below which `auto` never tries sparse.")
    max_density: float = Field(
        0.5, gt=0, le=1, description="Share of selected pairs above which `auto` runs a head, or all, exact."
    )

    # money
    price_per_device_hour_usd: Price | dict[str, Price] = Field(
        0.10,
        description='One price, or prices by device: {"cpu": 0.1, "NVIDIA H100": 3.0}. The longest prefix of the '
        "device's name counts, else the one for cpu or cuda.",
    )
    price_per_host_hour_usd: Price = Field(0.04, description="Price of an hour of a core that reads requests.")
    carbon_g_per_kwh: float | None = Field(
        None,
        ge=0,
        description="Grams of CO2 per kWh of electricity; measured joules are then reported in grams, too.",
    )
    ledger_url: str | None = Field(
        None,
        description="SQLAlchemy URL of the ledger and the budgets; default: SQLite in `state_dir`. Several nodes or "
        "services need PostgreSQL (postgresql+psycopg://...).",
    )
    ledger_keep_days: float = Field(
        30.0, ge=2, description="Days that single requests are kept; older ones are kept as hourly sums."
    )
    lease_share: float = Field(
        0.02, gt=0, le=1, description="Share of a budget that a replica leases, to spend without asking the ledger."
    )

    # tenants; without any, requests need no key and are recorded for `default`
    tenants: tuple[TenantConfig, ...] = ()
    tenants_file: Path | None = Field(
        None, description="JSON file with a list of more tenants (a mounted secret); reloaded when it changes."
    )

    request_log: bool = Field(
        False,
        description="Write one JSON line per request to stderr with its usage, also for refused, failed and cancelled "
        "requests; metrics have the sums.",
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL to which traces are sent by OTLP over HTTP, for example http://collector:4318/v1/traces.",
    )
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of requests traced when the caller does not decide it (traceparent)."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("state_dir")
    @classmethod
    def _expanded(cls, path: Path) -> Path:
        try:
            return path.expanduser()
        except RuntimeError:  # the user has no home directory
            return Path(tempfile.gettempdir()) / "farsight"

    @model_validator(mode="after")
    def _cross_check(self) -> Config:
        names = ("http_port", "grpc_port", "metrics_port", "haproxy_metrics_port", "haproxy_stats_port")
        ports = {name: getattr(self, name) for name in names}
        if len(set(ports.values())) != len(ports):
            raise ValueError(f"ports must differ: {ports}")
        if self.max_json_bytes > self.max_request_bytes:
            raise ValueError(f"max_json_bytes {self.max_json_bytes} is over max_request_bytes {self.max_request_bytes}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is under replicas {self.replicas}")
        models = [model.name for model in self.models]
        if len(set(models)) != len(models):
            raise ValueError(f"model names must differ: {models}")
        tenants = [tenant.name for tenant in self.tenants]
        if len(set(tenants)) != len(tenants):
            raise ValueError(f"tenant names must differ: {tenants}")
        return self

    @property
    def tenant_weights(self) -> dict[str, float]:
        return {tenant.name: tenant.weight for tenant in self.tenants}

    def hour_usd(self, *names: str) -> float:
        """Price in USD of a device hour; `names` of the device, the most specific first.

        The longest configured name that is a prefix of one of them counts. Raises ValueError if there is none.
        """
        if not isinstance(self.price_per_device_hour_usd, dict):
            return self.price_per_device_hour_usd
        for name in names:
            matching = [known for known in self.price_per_device_hour_usd if name.startswith(known)]
            if matching:
                return self.price_per_device_hour_usd[max(matching, key=len)]
        known = ", ".join(self.price_per_device_hour_usd) or "none"
        raise ValueError(f"price_per_device_hour_usd has no price for {' or '.join(names)}; it has prices for {known}")

    @property
    def ledger(self) -> str:
        """SQLAlchemy URL of the ledger: `ledger_url` or its default."""
        return self.ledger_url or f"sqlite:///{self.state_dir.resolve()}/ledger-{self.metrics_port}.sqlite"

    @property
    def write_ahead_dir(self) -> Path:
        """Directory of the write-ahead logs of a node's replicas."""
        return self.state_dir / f"journal-{self.metrics_port}"

    @property
    def metrics_dir(self) -> Path:
        """Directory of the metric files of a node's replicas."""
        return self.state_dir / f"metrics-{self.metrics_port}"

    @property
    def haproxy_dir(self) -> Path:
        """Directory of HAProxy's configuration and sockets. Short: of a socket path's 97 characters Ray uses 68."""
        return Path(tempfile.gettempdir()) / f"farsight-{self.http_port}"
