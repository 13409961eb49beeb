"""The promises on a WebSocket, under each server."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import becomes_true
from server import KINDS, Shop, open_shop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

pytestmark = pytest.mark.anyio

IDLE_SOCKETS = 200


def row(test: Any) -> Any:
    """Test it under every server, as a row of the table."""
    every_server = pytest.mark.parametrize("server", KINDS)
    return pytest.mark.matrix("Servers, on a WebSocket", "server")(every_server(test))


@pytest.fixture
def new_shop(server: str, tmp_path: Path) -> Iterator[Shop]:
    """A shop whose servers have still to be started."""
    shop = Shop(server, tmp_path, "servers")
    yield shop
    shop.close()


def call(shop: Shop, path: str = "/chat") -> connect:
    """A WebSocket to the shop's server."""
    return connect(shop.server.url.replace("http", "ws") + path, proxy=None, close_timeout=5)


async def say(socket: ClientConnection, note: str) -> str:
    """Send a text; the answer."""
    await socket.send(note)
    return str(await socket.recv())


@row
async def test_what_was_acknowledged_is_stored(server: str) -> None:
    """The work of a handler is committed before its answer is sent."""
    shop = await open_shop(server)
    async with call(shop) as socket:
        for number in range(1, 4):
            assert await say(socket, "lingering" if number == 1 else f"text {number}") == "stored"
            assert len(shop.real.stored()) == number
        await shop.assert_clean()
    await shop.assert_clean()
    assert shop.real.stored() == ["lingering", "text 2", "text 3"]


@row
@pytest.mark.parametrize("note", ["broken", "doomed", "refused"])
async def test_what_fails_is_not_acknowledged(server: str, note: str) -> None:
    """An exception, a failed COMMIT and an error code roll back and close the socket."""
    shop = await open_shop(server)
    async with call(shop) as socket:
        assert await say(socket, "before") == "stored"
        with pytest.raises(ConnectionClosed):
            await say(socket, note)
    assert shop.real.stored() == ["before"]
    await shop.assert_clean()


@row
async def test_a_denied_socket_rolls_back(server: str) -> None:
    """A denial sends 403 and rolls back."""
    shop = await open_shop(server)
    with pytest.raises(InvalidStatus) as caught:
        await call(shop, "/deny")
    assert caught.value.response.status_code == 403
    assert shop.real.stored() == []
    await shop.assert_clean()


@row
async def test_a_peer_that_vanishes_loses_nothing_that_was_acknowledged(server: str) -> None:
    """If the client vanishes, no connection leaks and no acknowledged work is lost."""
    shop = await open_shop(server)
    async with call(shop) as socket:
        assert await say(socket, "kept") == "stored"
        socket.transport.abort()
    await shop.assert_clean()
    assert shop.real.stored() == ["kept"]
    assert shop.server.post("next").status_code == 201


@row
async def test_idle_sockets_do_not_delay_a_request(server: str) -> None:
    """200 idle sockets on a pool of 2 do not delay a request."""
    shop = await open_shop(server)
    async with AsyncExitStack() as sockets:
        for batch in range(0, IDLE_SOCKETS, 20):
            opened = await asyncio.gather(
                *(sockets.enter_async_context(call(shop)) for _ in range(20))
            )
            texts = (say(socket, f"{batch + number}") for number, socket in enumerate(opened))
            assert set(await asyncio.gather(*texts)) == {"stored"}
        response = await asyncio.to_thread(shop.server.get)
        assert len(response.json()) == IDLE_SOCKETS
        assert shop.real.connections() <= 2
    await shop.assert_clean()


@row
async def test_a_server_that_is_stopped_leaves_no_connection_of_its_sockets(new_shop: Shop) -> None:
    """SIGTERM with an open socket closes every connection."""
    if new_shop.kind is KINDS["hypercorn"]:
        pytest.skip("From Python 3.12 on, hypercorn on asyncio waits until its clients have left")
    server = await new_shop.start().serving()
    async with call(new_shop) as socket:
        assert await say(socket, "kept") == "stored"
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        await stopping
    await becomes_true(lambda: new_shop.real.connections() == 0)
    assert new_shop.real.stored() == ["kept"]
