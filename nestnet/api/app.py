"""The routes of the controller, under /v1."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope

from nestnet import __version__
from nestnet.api import create, grants, identities, moves, shapes, streams, tenants
from nestnet.api.access import RIGHTS, Who, judge, recognise, recognised, still, who
from nestnet.api.asked import Rates, asked, changed, keyed
from nestnet.api.authority import Authority, make_authority
from nestnet.api.bodies import Bounded
from nestnet.api.direct import Direct
from nestnet.api.feed import Doorbell, Exchange, Followers, follow, sealed_for
from nestnet.api.metrics import Counts, measured
from nestnet.api.numbers import by_rows, domain_of
from nestnet.api.problem import problem
from nestnet.model import errors
from nestnet.model.exposition import CONTENT_TYPE, text
from nestnet.model.manifest import Manifest, parse, read_address
from nestnet.model.problems import CODES, join, moved
from nestnet.model.strict import read_json
from nestnet.model.values import FABRIC, Attach
from nestnet.store.database import explained
from nestnet.store.once import Asked
from nestnet.store.read import IN_NETWORK
from nestnet.store.scope import Scope
from nestnet.store.store import Store

PLURALS = {kind: {"policy": "policies"}.get(kind, f"{kind}s") for kind in shapes.RESOURCES}
PROBLEM = "application/problem+json"
HTTP_CODES = {404: "no_route", 405: "no_method", 413: "too_large"}
PAGE = 1000  # Items of one page at most.
LOOK = 5.0  # Seconds between two looks for machines that have fallen silent.

log = logging.getLogger("nestnet.api")

Limit = Annotated[int, Query(ge=1, le=PAGE, description="Items of a page at most.")]
Since = Annotated[str | None, Query(max_length=200, description="The token of the last line that you have.")]
How = Annotated[Asked, Depends(asked)]
Cascade = Annotated[
    bool,
    Query(
        description="A network: with all that is in it, and all that it carries. A tenant: with all below it, and all "
        "networks and tokens of theirs."
    ),
]
Reference = Annotated[str, Path(description="Public id, path, or the end of a path that only it has.")]


def create_app(store: Store, authority: Authority | None = None, rates: Rates | None = None) -> FastAPI:
    """The API of a store. `app.state.bell` rings its feeds and watches, `app.state.events` those who follow events."""
    rates = rates or Rates()
    authority = authority or Authority(*store.authority(make_authority))
    counts = Counts()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for left in (*store.folder.glob("nestnet-backup-*"), *store.folder.glob("nestnet-restore-*")):
            shutil.rmtree(left, ignore_errors=True)  # Of one that was killed meanwhile: it has keys in it.
        app.state.counts, app.state.followers = counts, Followers(store)
        app.state.bell = bell = Doorbell()
        app.state.events = happenings = Doorbell()
        store.changed = lambda _revision: bell.ring()
        store.happened = happenings.ring
        app.state.exchange = exchange = Exchange(store, bell)
        tasks = [asyncio.create_task(_look_around(store)), asyncio.create_task(exchange.run())]
        yield
        bell.close()
        happenings.close()
        for task in tasks:
            task.cancel()

    async def admitted(request: Request) -> None:
        known = who(request)
        rates.spend(known.tenant)
        machine = request.path_params.get("reference") or request.query_params.get("machine")
        judge(known, request.scope["route"].name, machine)

    app = FastAPI(
        title="nestnet",
        version=__version__,
        description="Virtual networks that carry virtual networks, to any depth.",
        lifespan=lifespan,
        max_body_size=None,  # Bounded's answer has our shape.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        responses={"default": {"model": shapes.Problem, "description": "What went wrong (RFC 9457)."}},
        dependencies=[Depends(admitted), Depends(_known_query)],
    )
    app.add_exception_handler(errors.NestnetError, _told)
    app.add_exception_handler(RequestValidationError, _badly_asked)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)
    routers = (
        create.routes(store),
        moves.routes(store),
        grants.routes(store),
        tenants.routes(store),
        _resources(store),
        _verbs(store),
        _operating(store),
        identities.routes(store, authority),
    )
    for router in routers:
        nobodys = [route.name for route in router.routes if isinstance(route, APIRoute) and route.name not in RIGHTS]
        if nobodys:
            raise RuntimeError(f"nobody may use {', '.join(nobodys)}: api/access.py has no row for it")
        app.include_router(router, prefix="/v1")
    (many,) = (route for route in routers[0].routes if isinstance(route, APIRoute) and route.name == "create_network")
    app.add_middleware(Direct, route=many, path=f"/v1{many.path}", admitted=admitted, told=_told_or_http)
    app.add_middleware(Bounded)
    app.add_middleware(_Recognised, store=store)
    app.add_middleware(_Logged, counts=counts)

    @app.get("/v1/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operating"])
    def metrics() -> PlainTextResponse:
        """Numbers of the controller, for Prometheus."""
        return PlainTextResponse(text(measured(store, counts, rates.refused)), media_type=CONTENT_TYPE)

    return app


async def _look_around(store: Store) -> None:
    while True:
        await asyncio.sleep(LOOK)
        try:
            await run_in_threadpool(store.look_around)
        except Exception:
            log.exception("looking for silent machines failed")


def _resources(store: Store) -> APIRouter:
    """GET a list, GET one, DELETE one: the same for every kind."""
    routes = APIRouter(tags=["resources"])
    for kind, shape in shapes.RESOURCES.items():
        plural = PLURALS[kind]
        lists, get, delete = _list(store, kind), _get(store, kind), _delete(store, kind)
        page = shapes.Listed[shape]  # type: ignore[valid-type]
        routes.add_api_route(f"/{plural}", lists, name=f"list_{plural}", response_model=page, summary=f"List {plural}")
        one = f"/{plural}/{{reference:path}}"
        exclude = kind == "policy"  # It has one of allow and deny.
        routes.add_api_route(
            one,
            get,
            name=f"get_{kind}",
            response_model=shape,
            response_model_exclude_none=exclude,
            summary=f"One {kind}",
        )
        routes.add_api_route(
            one,
            delete,
            methods=["DELETE"],
            name=f"delete_{kind}",
            response_model=shapes.Deleted,
            summary=f"Delete one {kind}; 409 with its dependants if it has any",
        )

    @routes.get("/hosts", response_model=shapes.Listed[shapes.Host], summary="List hosts")
    def list_hosts(
        request: Request,
        network: Annotated[str | None, Query(description="Of this network: path or id. Else of the fabric.")] = None,
        limit: Limit = 100,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """Where ports of networks may live: machines, for those that the wire carries, else host ports of the carrier.
        One shape for both."""
        items, following = store.hosts(network, limit, cursor, who(request).scope)
        return {"apiVersion": shapes.API_VERSION, "kind": "HostList", "items": items, "next": following}

    return routes


def _list(store: Store, kind: str) -> Callable[..., Any]:
    def answer(request: Request, network: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
        items, following = store.list(kind, network, limit, cursor, who(request).scope)
        title = kind.capitalize()
        return {"apiVersion": shapes.API_VERSION, "kind": f"{title}List", "items": items, "next": following}

    def in_network(
        request: Request,
        network: Annotated[str | None, Query(description="Only those in this network: path or id.")] = None,
        limit: Limit = 100,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        return answer(request, network, limit, cursor)

    def everywhere(request: Request, limit: Limit = 100, cursor: str | None = None) -> dict[str, Any]:
        return answer(request, None, limit, cursor)

    return in_network if kind in ("network", *IN_NETWORK) else everywhere


def _get(store: Store, kind: str) -> Callable[..., Any]:
    def get(reference: Reference, request: Request, response: Response) -> dict[str, Any]:
        known = who(request)
        found = store.get(kind, reference, known.scope) if known.machine is None else store.get_own(known.machine)
        response.headers["ETag"] = f'"{found["etag"]}"'
        return found

    return get


def _delete(store: Store, kind: str) -> Callable[..., Any]:
    def delete(reference: Reference, how: How) -> dict[str, Any]:
        return changed(store, how, store.delete(kind, reference, asked=how))

    def delete_all(reference: Reference, how: How, cascade: Cascade = False) -> dict[str, Any]:
        return changed(store, how, store.delete(kind, reference, cascade, how))

    return delete_all if kind in ("network", "tenant") else delete


def _verbs(store: Store) -> APIRouter:
    routes = APIRouter()
    manifested = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": shapes.Manifested.model_json_schema()}},
        }
    }

    @routes.post("/plan", response_model=shapes.Plan, openapi_extra=manifested, tags=["manifests"])
    async def plan(request: Request, response: Response) -> dict[str, Any]:
        """What apply would do."""
        body = await request.body()
        scope = who(request).scope

        def work() -> dict[str, Any]:
            return asdict(store.plan(*_read_manifest(body), scope))

        made = await run_in_threadpool(work)
        response.headers["ETag"] = f'"{made["etag"]}"'
        return made

    @routes.post("/apply", response_model=shapes.Applied, openapi_extra=manifested, tags=["manifests"])
    async def apply(request: Request, how: How) -> dict[str, Any]:
        """Make the networks that the manifest names as it says: all of it, or nothing.

        `If-Match` takes the ETag of a plan, or that of the one network which the manifest names."""
        body = await request.body()

        def work() -> dict[str, Any]:
            applied = store.apply(*_read_manifest(body), asked=how)
            return changed(store, how, applied.revision, plan=asdict(applied.plan))

        return await run_in_threadpool(work)

    @routes.post("/machines", response_model=shapes.Machine, tags=["machines"])
    async def join_machine(machine: shapes.Join, how: How) -> dict[str, Any]:
        """Declare a machine, or change its address, NICs, MTU, VLAN or trunks."""
        vlan = identities.judge_machine(machine)
        spec = (machine.name, machine.address, machine.mtu, machine.labels, machine.nics, vlan, machine.trunks)
        return await run_in_threadpool(store.join, *spec, asked=how)

    @routes.put("/machines/{reference}/status", status_code=204, tags=["machines"])
    def report(reference: str, said: shapes.Report, how: Annotated[Asked, Depends(keyed)], request: Request) -> None:
        """What an agent says of its machine. Events are written once for a key; all else may be said any often."""
        events = [(event.kind, event.text) for event in said.events]
        revision, ports, domain = said.revision, said.ports, domain_of(store, reference)
        if said.token is not None:  # what it had of another store is nothing of this one
            revision = store.identity.unseal(said.token, sealed_for(domain)) or 0
        elif who(request).machine is not None and domain != FABRIC:
            revision = 0  # it knows no numbers, and which one is enough it must not find out
        if ports is not None and domain != FABRIC:
            ports = by_rows(store, domain, ports)
        store.report(reference, revision, said.problems, ports, events, how)

    @routes.get("/status", response_model=shapes.Status, tags=["machines"])
    def status(
        request: Request,
        since: Annotated[str | None, Query(description="A change: the `token` of its answer.", max_length=200)] = None,
    ) -> dict[str, Any]:
        """How far each machine is, and whether it has realised a change."""
        known = None
        if since is not None and (known := store.identity.unseal(since, "watch")) is None:
            message = "this is no token of this store, which may be another one since a restore: ask without it"
            raise errors.Invalid([errors.Problem("bad_value", "/since", message)])
        found = store.status(who(request).scope, known)
        return {"apiVersion": shapes.API_VERSION, "controller": __version__, **found}

    @routes.patch("/links/{reference:path}", response_model=shapes.Linked, tags=["resources"])
    def patch_link(reference: Reference, state: shapes.LinkState, how: How) -> dict[str, Any]:
        """Take a link up or down; doing it twice is doing it once. All else of it is changed by apply."""
        revision, machines, link = store.set_link(reference, state.up, how)
        return changed(store, how, revision, machines=machines, link=link)

    @routes.patch("/ports/{reference:path}", response_model=shapes.Attached, tags=["resources"])
    def patch_port(reference: Reference, state: shapes.PortState, how: How) -> dict[str, Any]:
        """Say what a port's workload hangs on, or whether it is up; doing it twice is doing it once. All else of it is
        changed by apply."""
        if _one_of(state, "enabled", "attach") == "enabled":
            assert state.enabled is not None
            revision, machines, port = store.set_enabled("port", reference, state.enabled, how)
        else:
            revision, machines, port = store.set_attach(reference, _read_attach(state.attach), how)
        return changed(store, how, revision, machines=machines, port=port)

    @routes.patch("/networks/{reference:path}", response_model=shapes.Networked, tags=["resources"])
    def patch_network(reference: Reference, state: shapes.NetworkState, how: How) -> dict[str, Any]:
        """Take a network down or up, or give it another carrier, with all that it carries; doing it twice is doing it
        once. All else of it is changed by apply."""
        if _one_of(state, "enabled", "carrier") == "enabled":
            assert state.enabled is not None
            revision, machines, network = store.set_enabled("network", reference, state.enabled, how)
        else:
            revision, machines, network = store.recarry(reference, state.carrier, state.hosts, how)
        return changed(store, how, revision, machines=machines, network=network)

    @routes.get("/feed", response_class=StreamingResponse, responses=LINES, tags=["machines"])
    async def feed(
        request: Request,
        machine: str,
        since: str | None = None,
        boot: Annotated[str, Query(max_length=100, description="What tells the system that asks from others.")] = "",
    ) -> StreamingResponse:
        """What a machine needs, as it changes: `FeedLine`s, one at least every 5 s. One system at a time may follow."""
        row = await run_in_threadpool(store.machine_row, machine)
        followers, lines = request.app.state.followers, follow(store, request.app.state.exchange, row, since)
        followers.judge(row, machine, boot)
        lines = followers.following(row, machine, boot, lines)
        return _stream(store, request, "feed", lines)

    @routes.get("/trace", tags=["traffic"])
    def trace(
        request: Request,
        port: Annotated[str, Query(description="Where the packet starts: path or id.")],
        to: Annotated[str, Query(description="Its destination address.")],
        protocol: Annotated[str, Query(pattern="^(tcp|udp|icmp|icmpv6)$")] = "icmp",
        dport: Annotated[int, Query(ge=0, le=65535)] = 0,
    ) -> dict[str, Any]:
        """What would happen to a packet, layer by layer."""
        return _trace(store, port, to, protocol, dport, who(request).scope)

    return routes


def _one_of(state: shapes.NetworkState | shapes.PortState, *keys: str) -> str:
    """Which of these keys a body has. Raises Invalid unless it is one of them; `enabled: null` is none."""
    given = [key for key in keys if key in state.model_fields_set and (key != "enabled" or state.enabled is not None)]
    if not given:
        raise errors.Invalid([errors.Problem("missing_key", "", f"the body needs the key {' or '.join(keys)}")])
    if len(given) > 1:
        raise errors.Invalid([errors.Problem("bad_value", "", f"the body has {' and '.join(given)}: give one")])
    if "hosts" in state.model_fields_set and given != ["carrier"]:
        raise errors.Invalid([errors.Problem("bad_value", "/hosts", "hosts stand beside carrier, nothing else")])
    return given[0]


LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One JSON object a line.", "content": {"application/x-ndjson": {}}}
}


def _stream(store: Store, request: Request, name: str, lines: AsyncIterator[bytes]) -> StreamingResponse:
    lines = request.app.state.counts.while_open(name, _as_long_as(store, who(request), lines))
    return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})


async def _as_long_as(store: Store, known: Who, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream until whoever asked for it may not any more: streams have one every few seconds."""
    try:
        async for line in lines:
            if not await run_in_threadpool(still, store, known):
                return
            yield line
    finally:
        if isinstance(lines, AsyncGenerator):
            await lines.aclose()


def _operating(store: Store) -> APIRouter:
    """Following what happens, and the store as a whole."""
    routes = APIRouter(tags=["operating"])

    @routes.get("/watch", response_class=StreamingResponse, responses=LINES)
    async def watch(
        request: Request,
        since: Since = None,
        kind: Annotated[str | None, Query(pattern=f"^({'|'.join(shapes.RESOURCES)})$")] = None,
        network: Annotated[str | None, Query(description="Only what is in this network, and itself.")] = None,
    ) -> StreamingResponse:
        """Objects as they change, or all of them first: `WatchLine`s, one at least every 5 s."""
        scope = who(request).scope
        if network is not None:
            await run_in_threadpool(store.network_row, network, scope)
        lines = streams.watch(store, request.app.state.bell, since, kind, network, scope)
        return _stream(store, request, "watch", lines)

    @routes.get("/events", response_class=StreamingResponse, responses=LINES)
    async def events(
        request: Request,
        since: Since = None,
        last: Annotated[int, Query(ge=0, le=PAGE, description="Without a token: begin so many back.")] = 100,
        follow: Annotated[bool, Query(description="Go on with what is to come, a line at least every 5 s.")] = False,
    ) -> StreamingResponse:
        """What happened: who changed what, and what machines noticed. `EventLine`s, oldest first."""
        return _stream(store, request, "events", streams.events(store, request.app.state.events, since, last, follow))

    @routes.post("/confirm", response_model=shapes.Confirmed)
    def confirm(how: Annotated[Asked, Depends(keyed)]) -> dict[str, Any]:
        """Let agents remove what this store does not know: after a restore they hold that back."""
        return {"revision": store.confirm(how)}

    @routes.get("/backup", response_class=FileResponse)
    def backup() -> FileResponse:
        """The whole store in one file, keys included: keep it as secret as the store."""
        folder = FilePath(tempfile.mkdtemp(prefix="nestnet-backup-", dir=store.folder))
        file = folder / "store.backup"

        def remove() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # A copy that failed has a journal, too.

        try:
            store.backup(file)
        except BaseException:
            remove()
            raise
        return FileResponse(file, media_type="application/vnd.sqlite3", background=BackgroundTask(remove))

    @routes.post("/restore", response_model=shapes.Restored)
    async def restore(
        request: Request,
        force: Annotated[bool, Query(description="Agents may remove at once what the backup does not know.")] = False,
    ) -> dict[str, Any]:
        """Become what a backup is (the body), as a new store: tokens and ETags from before mean nothing any more."""
        with tempfile.TemporaryDirectory(prefix="nestnet-restore-", dir=store.folder) as folder:
            file = FilePath(folder) / "store.db"
            with explained(), file.open("wb") as copy:
                async for chunk in request.stream():
                    await run_in_threadpool(copy.write, chunk)
            return {"revision": await run_in_threadpool(store.restore, file, force, Asked(who(request).name))}

    return routes


def _trace(store: Store, port: str, to: str, protocol: str, dport: int, scope: Scope) -> dict[str, Any]:
    from pydantic_core import PydanticCustomError

    from nestnet.compile.explain import explain

    try:
        destination = read_address(to)
    except PydanticCustomError as error:
        raise errors.Invalid([errors.Problem(error.type, "/to", error.message())]) from None
    around = store.world(port, scope)
    return {
        "apiVersion": shapes.API_VERSION,
        "port": around.names["port", around.port],
        "to": str(destination),
        "protocol": protocol,
        "dport": dport,
        **explain(around.world, around.port, destination, protocol, dport, around.names, around.floor),
    }


def _read_manifest(body: bytes) -> tuple[Manifest, bool]:
    """The manifest of a plan or apply, and whether to prune. Problems point into the manifest."""
    data = read_json(body)
    if not isinstance(data, dict) or not isinstance(data.get("manifest"), dict):
        raise errors.Invalid([errors.Problem("missing_key", "", 'the body is {"manifest": {...}, "prune": false}')])
    if unknown := sorted(data.keys() - {"manifest", "prune"}):
        message = f"the body has the key {unknown[0][:80]!r}; there are manifest and prune"
        raise errors.Invalid([errors.Problem("unknown_key", "", message)])
    prune = data.get("prune", False)
    if not isinstance(prune, bool):
        raise errors.Invalid([errors.Problem("wrong_type", "", "prune is true or false")])
    return parse(data["manifest"]), prune


def _read_attach(attach: Any) -> Attach | None:
    """The rules for it are those of a manifest."""
    spec = {"segment": "s", "host": "h", "attach": attach}
    try:
        manifest = parse({"apiVersion": shapes.API_VERSION, "networks": {"n": {"ports": {"p": spec}}}})
    except errors.Invalid as error:
        at = join("networks", "n", "ports", "p")
        raise errors.Invalid([moved(p, p.pointer.removeprefix(at)) for p in error.problems]) from None
    assert manifest.networks is not None
    ports = manifest.networks["n"].ports
    assert ports is not None
    given = ports["p"].attach
    assert given is not None
    return given.value


# Errors


async def _known_query(request: Request) -> None:
    """A parameter that nobody reads is a misspelt one."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            there = f"; there are {', '.join(sorted(known))}" if known else ""
            raise errors.Invalid([errors.Problem("unknown_key", "", f"no parameter is called {name[:80]!r}{there}")])


def _problem(error: errors.NestnetError) -> JSONResponse:
    headers = {}
    if isinstance(error, errors.TooFast):
        headers["Retry-After"] = str(math.ceil(error.after))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem(error), error.status, headers, media_type=PROBLEM)


def _told(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.NestnetError)
    return _problem(error)


def _told_or_http(request: Request, error: Exception) -> JSONResponse:
    return _told(request, error) if isinstance(error, errors.NestnetError) else _http(request, error)


def _badly_asked(_request: Request, error: Exception) -> JSONResponse:
    """FastAPI's complaints in our shape; a pointer says where in the body, or which parameter."""
    assert isinstance(error, RequestValidationError)
    codes = {"missing": "missing_key", "extra_forbidden": "unknown_key"}
    problems = []
    for one in error.errors():
        place = join(*one["loc"][1:])
        ranges = "equal" in one["type"] or "than" in one["type"]
        code = codes.get(one["type"], "out_of_range" if ranges else "bad_value")
        name = "/".join(map(str, one["loc"][1:])) or str(one["loc"][0])
        if one["type"] in CODES:  # refused by the rules for manifests, in their words
            about = one.get("ctx", {})
            message = f"{name} {one['msg']}"
            problems.append(errors.Problem(one["type"], place, message, about.get("limit"), about.get("nearest")))
        else:
            problems.append(errors.Problem(code, place, f"{name}: {one['msg']}"))
    return _problem(errors.Invalid(problems))


def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    fields = {"type": "about:blank", "title": phrase, "status": error.status_code, "detail": str(error.detail)}
    code = HTTP_CODES.get(error.status_code, "bad_request")
    return JSONResponse({**fields, "code": code}, error.status_code, error.headers, media_type=PROBLEM)


def _internal(_request: Request, _error: Exception) -> JSONResponse:
    # Starlette raises the exception again after this, so that the server logs it with its traceback.
    return _problem(errors.NestnetError("a fault in the controller: its log says more"))


class _Recognised:
    """ASGI: who asks is known before anything of the request is read: `request.state.who`."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            state, header = scope.setdefault("state", {}), request.headers.get("authorization")
            try:
                state["who"] = recognised(state) if header is None else None
                if state["who"] is None:
                    state["who"] = await run_in_threadpool(recognise, self._store, state, header)
            except errors.NestnetError as error:
                await _problem(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Logged:
    """ASGI: one line for each request, when it ends; and the counts of them."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            took = time.perf_counter() - begun
            asker = who(Request(scope)).name
            where = (scope["method"], scope["path"], status, took * 1000, asker)
            log.info("request method=%s path=%r status=%d ms=%.1f who=%s", *where)
            # Anybody can send any method and path: what no route has is one series.
            route = getattr(scope.get("route"), "path", None)
            method, route = (scope["method"], route) if route is not None else ("other", "none")
            self._counts.add(method, route, status, took)
