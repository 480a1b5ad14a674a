"""API keys to tenants. Only hashes of keys are known here; a service without tenants is open to everybody."""

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

EVERYBODY = TenantConfig(name="default", is_admin=True)
TENANTS = TypeAdapter(list[TenantConfig])


def key_hash(key: str) -> str:
    """Keys are long and random (`farsight key`), so one round of SHA-256 cannot be searched backwards."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_of(headers: Mapping[str, str]) -> str | None:
    """`authorization: Bearer KEY` or `x-api-key: KEY`; names in lower case."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    return headers.get("x-api-key")


class Tenants:
    """The configured tenants and those of `tenants_file`, which may change while the service runs."""

    def __init__(self, config: Config) -> None:
        """ValueError where the file cannot be read, or two tenants share a name or a key."""
        self._configured, self._file = config.tenants, config.tenants_file
        self._read_at = 0.0
        self._by_hash: dict[str, TenantConfig] = {}
        self.by_name: dict[str, TenantConfig] = {}
        self.weights: dict[str, float] = {}  # the same object for ever: the scheduler looks into it
        self._set(config.tenants_file)

    @property
    def is_open(self) -> bool:
        return not self.by_name

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def label(self, name: str) -> str:
        """A tenant's name as a metric label; "unknown" unless configured, so that callers cannot create series."""
        return name if name == EVERYBODY.name or name in self.by_name else "unknown"

    def of(self, key: str | None) -> TenantConfig:
        """Whose key this is; 401 where it is nobody's."""
        if self.is_open:
            return EVERYBODY
        if not key:
            raise FarsightError(
                Kind.UNAUTHENTICATED, "an API key is needed: `authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        # by its hash: how long a look-up takes tells nothing about a key
        tenant = self._by_hash.get(key_hash(key))
        if tenant is None:
            raise FarsightError(Kind.UNAUTHENTICATED, "the API key is not known")
        return tenant

    def named(self, name: str) -> TenantConfig:
        """Of a request on its way; 401 where its tenant was removed meanwhile. In process nobody has a key."""
        if name in self.by_name:
            return self.by_name[name]
        if not self.is_open and name != EVERYBODY.name:
            raise FarsightError(Kind.UNAUTHENTICATED, "the tenant of this API key is no more")
        return EVERYBODY

    def refresh(self) -> None:
        """Take a changed file in; one that cannot be used leaves things as they are, and is told."""
        if self._file is None:
            return
        try:
            if self._file.stat().st_mtime != self._read_at:
                self._set(self._file)
                logger.info("tenants: %s", ", ".join(self.by_name))
        except (OSError, ValueError) as error:
            logger.error("tenants_file is not taken in: %s", error)

    def _set(self, file: Path | None) -> None:
        found = list(self._configured)
        if file is not None:
            self._read_at = file.stat().st_mtime  # before it is read: a later change is seen later
            found += _from_file(file)
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
            raise ValueError(f"{file} names no tenant: the service would be open to everybody")
        self._by_hash, self.by_name = by_hash, by_name
        self.weights.update({name: tenant.weight for name, tenant in by_name.items()})


def _from_file(file: Path) -> list[TenantConfig]:
    try:
        return TENANTS.validate_python(json.loads(file.read_text()))
    except ValidationError as error:  # without the input, which may hold a key put where its hash belongs
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{file}: {problems}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {error}") from None
