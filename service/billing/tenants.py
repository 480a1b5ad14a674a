"""API keys to tenants. Only hashes of keys are known here; a service without tenants needs no key."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from service.config import Config, TenantConfig
from service.errors import FarsightError, Kind

logger = logging.getLogger("farsight")

DEFAULT_TENANT = TenantConfig(name="default", is_admin=True)  # of all requests to a service without tenants
TENANTS = TypeAdapter(list[TenantConfig])


def key_hash(key: str) -> str:
    """SHA-256 in hex. One round is enough: keys are long and random (`farsight key`), so they cannot be guessed."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key in `authorization: Bearer KEY` or `x-api-key: KEY`; header names in lower case."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    return headers.get("x-api-key")


class Tenants:
    """The tenants of the configuration and of `tenants_file`, which may change while the service runs."""

    def __init__(self, config: Config) -> None:
        """Raises OSError or ValueError if the file cannot be used, ValueError if tenants share a name or a key."""
        self._configured, self._file = config.tenants, config.tenants_file
        self._mtime_s = 0.0
        self._by_hash: dict[str, TenantConfig] = {}
        self.by_name: dict[str, TenantConfig] = {}
        self.weights: dict[str, float] = {}  # updated in place: the scheduler keeps a reference
        self._load(config.tenants_file)

    @property
    def is_open(self) -> bool:
        """No tenant is configured: requests need no key."""
        return not self.by_name

    def label(self, name: str) -> str:
        """A tenant's name as a metric label; "unknown" unless configured, so that callers cannot create series."""
        return name if name == DEFAULT_TENANT.name or name in self.by_name else "unknown"

    def of(self, key: str | None) -> TenantConfig:
        """The tenant of an API key. Raises FarsightError (UNAUTHENTICATED)."""
        if self.is_open:
            return DEFAULT_TENANT
        if not key:
            raise FarsightError(
                Kind.UNAUTHENTICATED, "missing API key: expected `authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        # looked up by its hash: the time of the lookup reveals nothing about other keys
        tenant = self._by_hash.get(key_hash(key))
        if tenant is None:
            raise FarsightError(Kind.UNAUTHENTICATED, "unknown API key")
        return tenant

    def named(self, name: str) -> TenantConfig:
        """The tenant of a request in flight; `default` for requests made in process, without a key.

        Raises FarsightError (UNAUTHENTICATED) if the tenant was removed since.
        """
        if name in self.by_name:
            return self.by_name[name]
        if not self.is_open and name != DEFAULT_TENANT.name:
            raise FarsightError(Kind.UNAUTHENTICATED, "the tenant of this API key was removed")
        return DEFAULT_TENANT

    def refresh(self) -> None:
        """Load `tenants_file` if it has changed. If it cannot be used, log why and keep the tenants as they are."""
        if self._file is None:
            return
        try:
            if self._file.stat().st_mtime != self._mtime_s:
                self._load(self._file)
                logger.info("tenants: %s", ", ".join(self.by_name))
        except (OSError, ValueError) as error:
            logger.error("tenants_file was not loaded: %s", error)

    def _load(self, file: Path | None) -> None:
        found = list(self._configured)
        if file is not None:
            self._mtime_s = file.stat().st_mtime  # before reading: a change while reading is loaded next time
            found += _read(file)
        by_hash: dict[str, TenantConfig] = {}
        for tenant in found:
            for digest in tenant.key_sha256:
                if digest in by_hash:
                    raise ValueError(f"tenants {by_hash[digest].name!r} and {tenant.name!r} share a key")
                by_hash[digest] = tenant
        by_name = {tenant.name: tenant for tenant in found}
        if len(by_name) != len(found):
            raise ValueError(f"tenant names must differ: {[tenant.name for tenant in found]}")
        if file is not None and not by_name:
            raise ValueError(f"{file}: expected at least one tenant, got none; requests would need no key")
        self._by_hash, self.by_name = by_hash, by_name
        self.weights.update({name: tenant.weight for name, tenant in by_name.items()})


def _read(file: Path) -> list[TenantConfig]:
    try:
        return TENANTS.validate_python(json.loads(file.read_text()))
    except ValidationError as error:  # without the input: it may be a key instead of its hash
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{file}: {problems}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {error}") from None
