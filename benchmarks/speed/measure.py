"""Measures everything, one thing after the other."""

import os
from typing import Any

from benchmarks.faults.cluster import Cluster
from benchmarks.faults.run import running_cluster

from . import each_request, load, once
from .servers import running_servers
from .size import Size
from .tools import FAMILIES, FASTAPI, OURS, OVER_UVICORN

_POOL = 5
# The database needs no durable disk writes, because the disk is not part of any tool.
_SETTINGS = ("ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")


async def measure(size: Size) -> dict[str, Any]:
    """Return all results as JSON data."""
    async with running_cluster() as cluster:
        for setting in _SETTINGS:
            await cluster.query(setting)
        before = os.getloadavg()[0]
        found = await _measure(size, cluster)
        ((server,),) = await cluster.query("SHOW server_version")
    return {"load": [before, os.getloadavg()[0]], "postgresql": server, **found}


async def _measure(size: Size, cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = {"in process": {}, "over uvicorn": {}}
    url, fastapi = cluster.url("asyncpg"), size.chosen(FASTAPI)
    for family, tools in FAMILIES.items():
        own_url = cluster.url("psycopg" if "psycopg" in family or "def" in family else "asyncpg")
        found["in process"][family] = await each_request.in_process(
            size.chosen(tools), size, own_url
        )
        if family not in OVER_UVICORN:
            continue
        async with running_servers(size.chosen(tools), own_url, _POOL) as servers:
            found["over uvicorn"][family] = await each_request.over_http(servers, size)
            if tools is FASTAPI:
                found["held"] = await each_request.held(servers, size)
                found["slow readers"] = await load.slow_readers(servers, size)
                found["long run"] = await once.long_run(servers[OURS], size)
                found["listeners"] = await load.event_streams(servers, size)
    found["fast readers"] = await load.fast_readers(fastapi, size, url, _POOL)
    found["starts"] = await once.starts(fastapi, size, url)
    found["imports"] = await once.imports(fastapi, size)
    return found
