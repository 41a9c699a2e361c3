"""What the doctor runs on another host: ``ssh HOST python - TASK < this file``. Needs nothing but Python there."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("ird", "torch", "deepspeed")
SECONDS = 20  # after which a listener ends by itself, whatever became of who started it


def facts(folder: str, interface: str, port: int) -> dict[str, Any]:
    """Versions, code, clock, disk and network of this host, as a rank started in ``folder`` would find them."""
    there = os.access(folder, os.R_OK | os.X_OK)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "code": _code_digest(),
        "time": time.time(),
        "folder": there,
        "free": shutil.disk_usage(folder).free if there else 0,
        "interfaces": sorted(name for _, name in socket.if_nameindex() if name != "lo"),
        "address": _address(interface),
        "port_taken": _is_taken(port),
    }


def listen(address: str) -> None:
    """Print a free port, and take connections at it."""
    signal.alarm(SECONDS)
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            server.accept()[0].close()


def connect(*targets: str) -> dict[str, str]:
    """Try each ``address,port``; the reasons of those that do not answer."""
    failed = {}
    for target in targets:
        address, port = target.rsplit(",", 1)
        try:
            socket.create_connection((address, int(port)), timeout=3).close()
        except OSError as error:
            failed[target] = str(error)
    return failed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code_digest() -> str:
    """A hash over the source that ranks would run, since versions do not change with every commit."""
    digest = hashlib.sha256()
    for package in ("infra", "datagen", "training"):
        found = importlib.util.find_spec(package)
        for root in sorted(found.submodule_search_locations or []) if found else []:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _address(interface: str) -> str:
    """The IPv4 address of an interface, or the one that the host's own name leads to: what gloo would take."""
    if not interface:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return "127.0.0.1"
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def main(task: str, *arguments: str) -> None:
    if task == "facts":
        print(json.dumps(facts(arguments[0], arguments[1], int(arguments[2]))))
    elif task == "listen":
        listen(*arguments)
    else:
        print(json.dumps(connect(*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
