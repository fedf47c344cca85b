"""Tenants and their tokens: create, update, delete, issue, revoke.

Every change is on disk, and known to every process that answers calls, before it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from oracle_server.errors import InvalidArgument, QuotaExceeded, TenantExists, TenantInUse, TokenNotFound
from oracle_server.state import names
from oracle_server.state.credentials import Admission, Credentials
from oracle_server.state.experiments import Experiments, Followers
from oracle_server.state.principal import SCOPE_ADMIN, SCOPE_ENGINE, SCOPE_OPERATOR, Principal
from oracle_server.state.rates import StepRates
from oracle_server.state.records import Records
from oracle_server.state.store import Changes, TenantRow, TokenRow

# The old one and the new one, while their holders change over.
MAX_VALID_TOKENS = 2
_SHOWN = 5


class Tenants:
    """Owns who may call. Event loop only."""

    def __init__(
        self,
        experiments: Experiments,
        records: Records,
        credentials: Credentials,
        rates: StepRates,
        *,
        now_ns: Callable[[], int],
        followers: Followers,
    ) -> None:
        self._experiments = experiments
        self._records = records
        self._credentials = credentials
        self._rates = rates
        self._now_ns = now_ns
        self._followers = followers
        self._operators: tuple[Principal, ...] = ()
        self._tokens: dict[tuple[str, int], Principal] = {}

    async def load(self, operator_hashes: Iterable[bytes]) -> None:
        """Bring tokens and step quotas into memory, and take callers from now on."""
        self._operators = _operators(operator_hashes)
        for row in await self._records.call(self._records.store.valid_tokens):
            self._know(row)
        after = ""
        while rows := await self.page(after, 1000):
            for tenant in rows:
                self._rates.limit(tenant)
            after = rows[-1].tenant
        await self._admit()

    def admission(self) -> Admission:
        """Who may call now."""
        return Admission((*self._operators, *self._tokens.values()), self._rates.refused)

    async def trust_operator(self, hashes: Iterable[bytes]) -> None:
        """Take these as the operator's secrets from now on."""
        await self._records.change(self._trust_operator(_operators(hashes)), in_turn=False)

    async def learn(self, changes: Changes, own: Followers) -> None:
        """Take over what another server has changed; `own`: the shards of this server. Under the lock of memory."""
        for row in changes.tenants:
            self._experiments.know_tenant(row)
            self._rates.limit(row)
        for tenant in changes.deleted_tenants:
            self._experiments.forget_tenant(tenant)
            self._rates.limit(TenantRow(tenant))
        for token in changes.tokens:
            if token.revoke_time_ns:
                self._tokens.pop((token.tenant, token.number), None)
            else:
                self._know(token)
        if changes.tenants or changes.deleted_tenants or changes.tokens:
            await self._admit(own)

    async def check_rates(self) -> None:
        """Look at the step rates, and tell the followers whose steps are refused; called once a second."""
        before = self._rates.refused
        await self._rates.check()
        if self._rates.refused != before:
            # Nothing of the database: the other servers of a fleet look themselves.
            await self._records.change(self._admit(), in_turn=False)

    async def page(self, after: str, limit: int) -> list[TenantRow]:
        """Tenants in the order of their names, those behind `after`."""
        return await self._records.call(self._records.store.tenants, after, limit)

    async def create(self, row: TenantRow) -> TenantRow:
        """A new tenant; TenantExists, InvalidArgument."""
        names.check_tenant_id(row.tenant, "tenant_id")
        return await self._records.change(self._create(row))

    async def update(self, row: TenantRow) -> TenantRow:
        """Another quota; TenantNotFound."""
        return await self._records.change(self._update(row))

    async def delete(self, tenant: str) -> None:
        """Forget a tenant and end its tokens; TenantInUse while it has experiments or packs."""
        await self._records.change(self._delete(tenant))

    async def tokens(self, tenant: str, after: int, limit: int) -> list[TokenRow]:
        """Every token, oldest first, those behind number `after`."""
        return await self._records.call(self._records.store.tokens, tenant, after, limit)

    async def issue(self, tenant: str, scope: str, secret_sha256: bytes, comment: str) -> TokenRow:
        """A new token; QuotaExceeded where MAX_VALID_TOKENS of the scope are valid."""
        if scope not in (SCOPE_ENGINE, SCOPE_ADMIN):
            raise InvalidArgument(f"scope is {scope!r}; allowed: {SCOPE_ENGINE}, {SCOPE_ADMIN}", field="scope")
        names.check_comment(comment, "comment")
        return await self._records.change(self._issue(tenant, scope, secret_sha256, comment))

    async def revoke(self, tenant: str, number: int) -> TokenRow:
        """End a token; TokenNotFound. At the return no process takes it."""
        return await self._records.change(self._revoke(tenant, number))

    # Below: the changes themselves, under the lock of `Records.change`.

    async def _trust_operator(self, operators: tuple[Principal, ...]) -> None:
        self._operators = operators
        await self._admit()

    async def _create(self, row: TenantRow) -> TenantRow:
        if self._experiments.knows_tenant(row.tenant):
            raise TenantExists(
                f"{names.tenant_name(row.tenant)} exists; `step-oracle tenant update` changes what it may use"
            )
        return await self._write(row)

    async def _update(self, row: TenantRow) -> TenantRow:
        self._experiments.tenant(row.tenant)
        return await self._write(row)

    async def _write(self, row: TenantRow) -> TenantRow:
        await self._records.call(self._records.store.write_tenant, row)
        self._experiments.know_tenant(row)
        self._rates.limit(row)
        await self._admit()
        return row

    async def _delete(self, tenant: str) -> None:
        self._experiments.tenant(tenant)
        experiments = [live.name for live in self._experiments.all() if live.tenant == tenant]
        packs = [row.digest for row in await self._records.call(self._records.store.packs, tenant, "", _SHOWN + 1)]
        if experiments or packs:
            kinds = [_listed(kind, found) for kind, found in (("experiments", experiments), ("packs", packs)) if found]
            raise TenantInUse(f"{names.tenant_name(tenant)} has {' and '.join(kinds)}; delete them first")
        await self._records.call(self._records.store.delete_tenant, tenant, self._now_ns())
        self._experiments.forget_tenant(tenant)
        self._tokens = {key: principal for key, principal in self._tokens.items() if key[0] != tenant}
        self._rates.limit(TenantRow(tenant))
        await self._admit()

    async def _issue(self, tenant: str, scope: str, secret_sha256: bytes, comment: str) -> TokenRow:
        self._experiments.tenant(tenant)
        valid = [
            principal.name
            for principal in self._tokens.values()
            if (principal.tenant, principal.scope) == (tenant, scope)
        ]
        if len(valid) >= MAX_VALID_TOKENS:
            raise QuotaExceeded(
                f"{names.tenant_name(tenant)} has {len(valid)} valid tokens of scope {scope} ({', '.join(valid)}); "
                f"allowed: {MAX_VALID_TOKENS}; revoke the one nobody uses any more"
            )
        store = self._records.store
        row = await self._records.call(store.add_token, tenant, scope, secret_sha256, comment, self._now_ns())
        self._know(row)
        await self._admit()
        return row

    async def _revoke(self, tenant: str, number: int) -> TokenRow:
        row = await self._records.call(self._records.store.token, tenant, number)
        if row is None:
            raise TokenNotFound(
                f"there is no token {names.token_name(tenant, number)}; `step-oracle tenant token list` shows them"
            )
        if row.revoke_time_ns:
            return row
        now_ns = self._now_ns()
        await self._records.call(self._records.store.revoke_token, tenant, number, now_ns)
        self._tokens.pop((tenant, number), None)
        await self._admit()
        return replace(row, revoke_time_ns=now_ns)

    def _know(self, row: TokenRow) -> None:
        name = names.token_name(row.tenant, row.number)
        self._tokens[row.tenant, row.number] = Principal(name, row.scope, row.tenant, row.secret_sha256)

    async def _admit(self, followers: Followers | None = None) -> None:
        admission = self.admission()
        # The other processes first: a revoked token is taken nowhere once it is not taken here.
        await (followers or self._followers).admit(admission)
        self._credentials.replace(admission.principals)


def _operators(hashes: Iterable[bytes]) -> tuple[Principal, ...]:
    return tuple(Principal(SCOPE_OPERATOR, SCOPE_OPERATOR, credential=credential) for credential in hashes)


def _listed(kind: str, found: list[str]) -> str:
    more = " and more" if len(found) > _SHOWN else ""
    return f"the {kind} {', '.join(found[:_SHOWN])}{more}"
