"""The routes of the controller, under /v1."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestnet import __version__
from nestnet.api import shapes
from nestnet.api.bodies import Bounded, read_json
from nestnet.api.feed import Doorbell, follow
from nestnet.model import errors
from nestnet.model.manifest import Manifest, parse, read_address
from nestnet.model.problems import join, moved
from nestnet.model.values import Attach
from nestnet.store.read import IN_NETWORK
from nestnet.store.store import Store

PLURALS = {kind: {"policy": "policies"}.get(kind, f"{kind}s") for kind in shapes.RESOURCES}
PROBLEM = "application/problem+json"
HTTP_CODES = {404: "no_route", 405: "no_method", 413: "too_large"}
PAGE = 1000  # Items of one page at most.

log = logging.getLogger("nestnet.api")

Limit = Annotated[int, Query(ge=1, le=PAGE, description="Items of a page at most.")]
Reference = Annotated[str, Path(description="Public id, path, or the end of a path that only it has.")]


def create_app(store: Store) -> FastAPI:
    """The API of a store. `app.state.bell` rings its feeds."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.bell = bell = Doorbell()
        store.changed = lambda _revision: bell.ring()
        yield
        bell.close()

    app = FastAPI(
        title="nestnet",
        version=__version__,
        description="Virtual networks that carry virtual networks, to any depth.",
        lifespan=lifespan,
        max_body_size=None,  # Bounded's answer has our shape.
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        responses={"default": {"model": shapes.Problem, "description": "What went wrong (RFC 9457)."}},
        dependencies=[Depends(_known_query)],
    )
    app.add_middleware(Bounded)
    app.add_middleware(_Logged)
    app.add_exception_handler(errors.NestnetError, _told)
    app.add_exception_handler(RequestValidationError, _badly_asked)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)
    app.include_router(_resources(store), prefix="/v1")
    app.include_router(_verbs(store), prefix="/v1")
    return app


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
    return routes


def _list(store: Store, kind: str) -> Callable[..., Any]:
    def answer(network: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
        items, following = store.list(kind, network, limit, cursor)
        title = kind.capitalize()
        return {"apiVersion": shapes.API_VERSION, "kind": f"{title}List", "items": items, "next": following}

    def in_network(
        network: Annotated[str | None, Query(description="Only those in this network: path or id.")] = None,
        limit: Limit = 100,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        return answer(network, limit, cursor)

    def everywhere(limit: Limit = 100, cursor: str | None = None) -> dict[str, Any]:
        return answer(None, limit, cursor)

    return in_network if kind in ("network", *IN_NETWORK) else everywhere


def _get(store: Store, kind: str) -> Callable[..., Any]:
    def get(reference: Reference) -> dict[str, Any]:
        return store.get(kind, reference)

    return get


def _delete(store: Store, kind: str) -> Callable[..., Any]:
    def delete(reference: Reference) -> dict[str, Any]:
        return {"revision": store.delete(kind, reference)}

    return delete


def _verbs(store: Store) -> APIRouter:
    routes = APIRouter()
    manifested = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": shapes.Manifested.model_json_schema()}},
        }
    }

    @routes.post("/plan", response_model=shapes.Plan, openapi_extra=manifested, tags=["manifests"])
    async def plan(request: Request) -> dict[str, Any]:
        """What apply would do."""
        body = await request.body()

        def work() -> dict[str, Any]:
            return asdict(store.plan(*_read_manifest(body)))

        return await run_in_threadpool(work)

    @routes.post("/apply", response_model=shapes.Applied, openapi_extra=manifested, tags=["manifests"])
    async def apply(
        request: Request, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None
    ) -> dict[str, Any]:
        """Make the networks that the manifest names as it says: all of it, or nothing."""
        body = await request.body()

        def work() -> dict[str, Any]:
            return asdict(store.apply(*_read_manifest(body), key=idempotency_key))

        return await run_in_threadpool(work)

    @routes.post("/machines", response_model=shapes.Machine, tags=["machines"])
    async def join_machine(machine: shapes.Join) -> dict[str, Any]:
        """Declare a machine, or change its address, NICs or MTU."""
        _judge_machine(machine)
        return await run_in_threadpool(
            store.join, machine.name, machine.address, machine.mtu, machine.labels, machine.nics
        )

    @routes.put("/machines/{reference}/status", status_code=204, tags=["machines"])
    def report(reference: str, said: shapes.Report) -> None:
        """What an agent says of its machine."""
        store.report(reference, said.revision, said.problems, said.ports)

    @routes.get("/status", response_model=shapes.Status, tags=["machines"])
    def status() -> dict[str, Any]:
        """The revision, and how far each machine is."""
        return {"apiVersion": shapes.API_VERSION, "controller": __version__, **store.status()}

    @routes.patch("/links/{reference:path}", response_model=shapes.Linked, tags=["resources"])
    def patch_link(reference: Reference, state: shapes.LinkState) -> dict[str, Any]:
        """Take a link up or down; doing it twice is doing it once. All else of it is changed by apply."""
        revision, machines, link = store.set_link(reference, state.up)
        return {"revision": revision, "machines": machines, "link": link}

    @routes.patch("/ports/{reference:path}", response_model=shapes.Attached, tags=["resources"])
    def patch_port(reference: Reference, state: shapes.PortState) -> dict[str, Any]:
        """Say what a port's workload hangs on; doing it twice is doing it once. All else of it is changed by apply."""
        revision, machines, port = store.set_attach(reference, _read_attach(state.attach))
        return {"revision": revision, "machines": machines, "port": port}

    lines: dict[int | str, dict[str, Any]] = {
        200: {"description": "One JSON object a line.", "content": {"application/x-ndjson": {}}}
    }

    @routes.get("/feed", response_class=StreamingResponse, responses=lines, tags=["machines"])
    async def feed(request: Request, machine: str, since: str | None = None) -> StreamingResponse:
        """What a machine needs, as it changes: `FeedLine`s, one at least every 5 s."""
        row = await run_in_threadpool(store.machine_row, machine)
        return StreamingResponse(
            follow(store, request.app.state.bell, row, since),
            media_type="application/x-ndjson",
            headers={"Cache-Control": "no-store"},
        )

    @routes.get("/trace", tags=["traffic"])
    def trace(
        port: Annotated[str, Query(description="Where the packet starts: path or id.")],
        to: Annotated[str, Query(description="Its destination address.")],
        protocol: Annotated[str, Query(pattern="^(tcp|udp|icmp|icmpv6)$")] = "icmp",
        dport: Annotated[int, Query(ge=0, le=65535)] = 0,
    ) -> dict[str, Any]:
        """What would happen to a packet, layer by layer."""
        return _trace(store, port, to, protocol, dport)

    return routes


def _trace(store: Store, port: str, to: str, protocol: str, dport: int) -> dict[str, Any]:
    from pydantic_core import PydanticCustomError

    from nestnet.compile.explain import explain

    try:
        destination = read_address(to)
    except PydanticCustomError as error:
        raise errors.Invalid([errors.Problem(error.type, "/to", error.message())]) from None
    world, row, names = store.world(port)
    return {
        "apiVersion": shapes.API_VERSION,
        "port": names["port", row],
        "to": str(destination),
        "protocol": protocol,
        "dport": dport,
        **explain(world, row, destination, protocol, dport, names),
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


def _judge_machine(machine: shapes.Join) -> None:
    """The rules for machines are those of a manifest."""
    spec: dict[str, Any] = {"address": machine.address, "mtu": machine.mtu, "labels": machine.labels}
    if machine.nics:
        spec["nic"] = machine.nics
    parse({"apiVersion": shapes.API_VERSION, "machines": {machine.name: spec}})


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


def _known_query(request: Request) -> None:
    """A parameter that nobody reads is a misspelt one."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            there = f"; there are {', '.join(sorted(known))}" if known else ""
            raise errors.Invalid([errors.Problem("unknown_key", "", f"no parameter is called {name[:80]!r}{there}")])


def _problem(error: errors.NestnetError) -> JSONResponse:
    fields: dict[str, Any] = {
        "type": f"urn:nestnet:error:{error.code}",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
    }
    if isinstance(error, errors.Invalid):
        fields["problems"] = [asdict(problem) for problem in error.problems]
        fields["detail"] = error.problems[0].message if len(error.problems) == 1 else f"{len(error.problems)} problems"
    for name in ("dependants", "candidates", "limit", "nearest"):
        if getattr(error, name, None):
            fields[name] = getattr(error, name)
    return JSONResponse(fields, error.status, media_type=PROBLEM)


def _told(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.NestnetError)
    return _problem(error)


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


class _Logged:
    """ASGI: one line for each request, when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            took = (time.perf_counter() - begun) * 1000
            log.info("request method=%s path=%r status=%d ms=%.1f", scope["method"], scope["path"], status, took)
