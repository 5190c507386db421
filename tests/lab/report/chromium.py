"""A headless Chromium over its DevTools protocol: opens a page as a phone or a desk would, and says what happened.

Speaks through aiohttp's WebSocket, which the gateway needs anyway: no driver to install beside the browser.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)
START_S = 60.0


class Page:
    """One tab. `said`: console messages, exceptions and log entries; `asked`: every URL that it requested."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self._listener = asyncio.create_task(self._listen())

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self._answers[number], 30)

    async def _listen(self) -> None:
        async for message in self._socket:
            news = json.loads(message.data)
            if "id" in news:
                answer = self._answers.pop(news["id"])
                if "error" in news:
                    answer.set_exception(RuntimeError(str(news["error"])))
                else:
                    answer.set_result(news["result"])
                continue
            match news["method"]:
                case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                    self.said.append(json.dumps(news["params"]))
                case "Network.requestWillBeSent":
                    self.asked.append(news["params"]["request"]["url"])
                case "Page.loadEventFired":
                    self._loaded.set()

    async def open(self, url: str, width: int, height: int = 800, dark: bool = False, touch: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), 30)

    async def eval(self, script: str) -> Any:
        """The value of an expression; an exception in it is one here."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def settled(self) -> None:
        """Scrolling and what listens to it are done: both happen before a frame is drawn."""
        await self.eval("(async () => { for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); })()")

    async def mouse(self, x: float, y: float, kind: str = "mouseMoved") -> None:
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y)

    async def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def screenshot(self, path: Path, height: float) -> None:
        """The first `height` pixels of the page, as a PNG."""
        width = await self.eval("document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def tab() -> AsyncIterator[Page]:
    """A fresh browser with one empty tab; both end on leaving."""
    assert BROWSER
    with tempfile.TemporaryDirectory(prefix="outrider-chromium-", ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        null = asyncio.subprocess.DEVNULL
        browser = await asyncio.create_subprocess_exec(*command, stdout=null, stderr=null)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", browser)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    targets = await answer.json()
                url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            browser.terminate()
            await asyncio.wait_for(browser.wait(), 10)


async def _port(said: Path, browser: asyncio.subprocess.Process) -> int:
    """The browser writes its port to a file as soon as it listens."""
    by_s = time.monotonic() + START_S
    while time.monotonic() < by_s:
        assert browser.returncode is None, f"{BROWSER} ended with code {browser.returncode}"
        if said.exists() and (lines := said.read_text().splitlines()):
            return int(lines[0])
        await asyncio.sleep(0.05)
    raise AssertionError(f"{BROWSER} did not listen within {START_S:.0f} s")
