"""`megarl watch RUN [port=8899] [open=true]`: a page that follows a run while it trains."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from megarl.disk import exists, local, shown
from megarl.errors import ConfigError
from megarl.report.folders import run_folder

USAGE = "megarl watch RUN [port=8899] [open=true]"
_PORT = 8899
_LARGEST_PORT = 65535
_SETTINGS = ("port", "open")


def run(argv: Sequence[str]) -> int:
    """Serve the page of the run that a command line names until Ctrl-C, which raises KeyboardInterrupt."""
    name, port, browser = _arguments(argv)
    folder = run_folder(name, "watch", several=False, unlogged=True)
    from megarl.watch.live import LivePage
    from megarl.watch.server import WatchServer

    with WatchServer(LivePage(folder), port) as server:
        sys.stdout.write(f"{server.address} follows {shown(folder, 1000)}; Ctrl-C ends it\n")
        if "SSH_CONNECTION" in os.environ:
            number = server.server_address[1]
            sys.stdout.write(f"on your own machine, first: ssh -L {number}:localhost:{number} {_host()}\n")
        sys.stdout.flush()
        if browser:
            _open(server.address)
        server.serve_forever()
    return 0


def _arguments(argv: Sequence[str]) -> tuple[str, int, bool]:
    """Return the run that a command line names, the port, and whether to open a browser."""
    runs: list[str] = []
    port, browser = _PORT, False
    for word in argv:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(
                f"megarl watch has no option '{shown(word)}': write {USAGE}", key=shown(key), value=value or None
            )
        if equals and key == "port":
            port = _port(value)
        elif equals and key == "open":
            browser = _switch(value)
        elif equals and not exists(local(word)):
            raise _no_setting(key, value)
        else:
            runs.append(word)
    if not runs:
        raise ConfigError(f"megarl watch needs the folder of a run, as in megarl watch runs/demo; {USAGE}", key="RUN")
    if len(runs) > 1:
        raise ConfigError(
            f"RUN={shown(runs[1])} is a second run: megarl watch follows one (start it once for each, with another "
            "port); megarl report compares several",
            key="RUN",
            value=runs[1],
        )
    return runs[0], port, browser


def _port(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9 or int(value) > _LARGEST_PORT:
        raise ConfigError(
            f"port={shown(value)} is not a port: use a number up to {_LARGEST_PORT}, as in port={_PORT}; 0 is any free "
            "one",
            key="port",
            value=value,
            offers={"port": [_PORT, 0]},
        )
    return int(value)


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError(
            f"open={shown(value)} is not valid: choose true (open the page in a browser) or false",
            key="open",
            value=value,
            offers={"open": [True, False]},
        )
    return value.lower() == "true"


def _no_setting(key: str, value: str) -> ConfigError:
    near = difflib.get_close_matches(key.lower(), [*_SETTINGS, "run"], n=1, cutoff=0.6)
    if near == ["run"]:
        meant = f"write {shown(value)} alone"
    else:
        meant = f"did you mean {near[0]}=?" if near else "its settings are port= and open="
    return ConfigError(
        f"{shown(key)}= is no setting of megarl watch: {meant}; {USAGE}",
        key=shown(key),
        value=value,
        offers={shown(key): near or list(_SETTINGS)},
    )


def _open(address: str) -> None:
    """Open the page in a browser of this machine's display; a browser in the terminal would take the terminal."""
    import webbrowser

    display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if not display or not webbrowser.open(address):
        sys.stderr.write("open=true found no display or browser: open the address yourself\n")


def _host() -> str:
    import socket

    return socket.gethostname()
