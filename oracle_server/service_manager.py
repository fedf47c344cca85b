"""What the server tells the service manager that started it: systemd's notification protocol, sd_notify(3).

A datagram of NAME=VALUE lines to the socket $NOTIFY_SOCKET names. Written out here because it is ten lines; the
libraries for it need libsystemd's headers or have not been released since 2017.
"""

from __future__ import annotations

import os
import socket
from typing import Any


def tell_ready(events: Any, status: str) -> None:
    """The start is over; `status` is the line `systemctl status` shows."""
    _tell(events, "READY=1", f"STATUS={status}")


def tell_stopping(events: Any, status: str) -> None:
    """The end has begun."""
    _tell(events, "STOPPING=1", f"STATUS={status}")


def _tell(events: Any, *lines: str) -> None:
    """Send the lines; nothing where no service manager listens. A failure is logged: it must not end the server."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A leading @ stands for the NUL byte of Linux's abstract sockets.
    path = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect(path)
            manager.sendall("\n".join(lines).encode())
    except OSError as error:
        events.warning("service_manager_not_told", socket=address, said=lines[0], error=str(error))
