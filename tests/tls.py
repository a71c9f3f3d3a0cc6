"""Servers with certificates for tests: a TLS front for any plain server, with a good, wrong, expired or foreign one."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import trustme

Kind = Literal["good", "wrong name", "expired", "foreign"]


class Certificates:
    """An issuer that tests trust, one that they do not, and server certificates of each kind."""

    def __init__(self, folder: Path) -> None:
        self._issuer, self._foreign = trustme.CA(), trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self._issuer.cert_pem.write_to_path(self.ca_file)

    def server(self, kind: Kind) -> ssl.SSLContext:
        """The context of a server for 127.0.0.1 whose certificate is of this kind."""
        issuer = self._foreign if kind == "foreign" else self._issuer
        ended = datetime.now(UTC) - timedelta(days=1) if kind == "expired" else None
        name = "elsewhere.example" if kind == "wrong name" else "127.0.0.1"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issuer.issue_cert(name, not_after=ended).configure_cert(context)
        return context


@contextlib.contextmanager
def tls_front(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """The port of a server that speaks TLS and passes everything on to the plain server on *port*."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: set[socket.socket] = set()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(plain: socket.socket) -> None:
        try:
            client = context.wrap_socket(plain, server_side=True)
        except OSError:  # the client refused our certificate
            plain.close()
            return
        server = socket.create_connection(("127.0.0.1", port))
        open_sockets.update((client, server))
        back = threading.Thread(target=pump, args=(server, client), daemon=True)
        back.start()
        pump(client, server)
        back.join()
        for one in (client, server):
            one.close()
            open_sockets.discard(one)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for one in list(open_sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        thread.join()
