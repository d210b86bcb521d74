"""``GET /``: the page on which a person asks prompts. Its files are fixed, and ask no other host for anything."""

from __future__ import annotations

from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

INDEX = "index.html"
KINDS = MappingProxyType(
    {
        INDEX: "text/html; charset=utf-8",
        "page.css": "text/css; charset=utf-8",
        "page.js": "text/javascript; charset=utf-8",
        "icon.svg": "image/svg+xml",
    }
)
FILES = MappingProxyType({name: (files("ptuning.serve.http") / "page" / name).read_bytes() for name in KINDS})

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index() -> Response:
    """Return the page."""
    return _file(INDEX)


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(name: str) -> Response:
    """Return one of the files that the page needs."""
    if name == INDEX or name not in FILES:
        raise HTTPException(404, "the page has no such file")
    return _file(name)


def _file(name: str) -> Response:
    # A browser asks again each time: the files change with the version, and their names do not.
    return Response(FILES[name], headers={"Content-Type": KINDS[name], "Cache-Control": "no-cache"})
