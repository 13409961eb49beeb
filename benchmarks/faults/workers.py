"""Server processes that are started again after each crash."""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

from .client import Request, ask
from .cluster import HOST, free_port

_ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds


class Workers:
    """Several uvicorn processes, each on a free port, as behind a load balancer.

    Args:
        tool: The name of a module of `benchmarks.peers`.
        url: The `DATABASE_URL` of the processes.
        count: The number of processes.
        spared: The number of processes that `signal_one` leaves alone.
    """

    def __init__(self, tool: str, url: str, count: int = 2, spared: int = 0) -> None:
        self.tool = tool
        self.ports = [free_port() for _ in range(count)]
        self._mortal = self.ports[spared:]
        self.log = Path(tempfile.mkdtemp(prefix="workers-")) / "log"
        self._url = url
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._supervisors: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the processes, and wait until all of them serve requests.

        Raises:
            RuntimeError: A process does not serve; the text gives the reason.
        """
        self.log.parent.mkdir(exist_ok=True)
        self._supervisors = [asyncio.create_task(self._supervise(port)) for port in self.ports]
        try:
            async with asyncio.timeout(_PATIENCE):
                for port in self.ports:
                    while not await ask(port, Request("/nothing", "GET")):
                        await asyncio.sleep(0.05)
        except TimeoutError:
            printed = await asyncio.to_thread(self.log.read_text)
            await self.stop()
            raise RuntimeError(f"{self.tool} does not serve:\n{printed}") from None

    async def stop(self) -> None:
        """Kill the processes, and delete their output."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
        self._processes.clear()
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def signal_one(self, signal: int, random: Random) -> None:
        """Send a signal to one of the processes."""
        process = self._processes[random.choice(self._mortal)]
        if process.returncode is None:
            process.send_signal(signal)

    async def _supervise(self, port: int) -> None:
        command = ["-m", "uvicorn", "--factory", "benchmarks.faults.worker:application"]
        options = ["--port", str(port), "--host", HOST, "--timeout-graceful-shutdown", "3"]
        variables = {"TOOL": self.tool, "DATABASE_URL": self._url, "PYTHONPATH": str(_ROOT)}
        while True:
            with self.log.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, *command, *options, "--no-access-log",
                    cwd=_ROOT, env=os.environ | variables, stdout=log, stderr=log,
                )  # fmt: skip
            self._processes[port] = process
            await process.wait()
            await asyncio.sleep(0.1)
