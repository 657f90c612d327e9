"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0",
)  # fmt: skip


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """One page. `complaints`: errors and warnings of its console; `asked`: URLs it requested."""

    socket: Any
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    _sent: int = 0
    _session: str = ""

    def call(self, method: str, **parameters: Any) -> Any:
        """One command and its answer; events that come before it are noted."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self.socket.send(json.dumps(message))
        while True:
            found = json.loads(self.socket.recv())
            if found.get("id") == self._sent:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)

    def js(self, expression: str) -> Any:
        """The value of an expression, of a promise the one that it comes to."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str, width: int, height: int, phone: bool = False) -> None:
        """Load a page at a size and wait until its charts are drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self.call("Page.navigate", url=url)
        self.wait("document.documentElement?.dataset.drawn === 'yes'")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, (condition, self.complaints)
            time.sleep(0.05)

    def screenshot(self, file: Path, whole: bool = True) -> Path:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(told["entry"]))


@contextlib.contextmanager
def tab(binary: str, profile: Path) -> Iterator[Tab]:
    """A browser of its own with an empty profile, and one page in it."""
    profile.mkdir(parents=True)
    # Fonts and settings are looked for in HOME; a profile of its own keeps that out of the test.
    environment = os.environ | {"HOME": str(profile), "XDG_CONFIG_HOME": str(profile / "config"),
                                "XDG_CACHE_HOME": str(profile / "cache")}  # fmt: skip
    log = (profile.parent / f"{profile.name}.log").open("wb")
    process = subprocess.Popen(
        [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=log, stderr=log, env=environment,
    )  # fmt: skip
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + 60.0
        while not (port.is_file() and len(port.read_text().splitlines()) == 2):
            assert process.poll() is None, "Chromium ended at once; see the log beside its profile"
            assert time.monotonic() < end, "Chromium opened no port"
            time.sleep(0.05)
        number, path = port.read_text().splitlines()
        url = f"ws://127.0.0.1:{number}{path}"
        socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        made = Tab(socket)
        target = made.call("Target.createTarget", url="about:blank")["targetId"]
        attached = made.call("Target.attachToTarget", targetId=target, flatten=True)
        made._session = attached["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            made.call(f"{domain}.enable")
        yield made
        made._session = ""
        made.call("Browser.close")
        socket.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        log.close()
