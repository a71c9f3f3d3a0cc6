"""Servers that misbehave at the level of sockets: each connection is handled by a function of the test."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

from tests.waiting import patience


class Peer:
    """One client's connection, as the server sees it."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self.sock = sock
        self.stopping = stopping
        self.read = b""

    def request(self) -> bytes:
        """The next whole request with its body; empty when the client closed."""
        while not (match := re.search(rb"\r\n\r\n", self.read)) or len(self.read) < match.end() + _length(self.read):
            try:
                piece = self.sock.recv(65536)
            except OSError:
                piece = b""
            if not piece:
                return b""
            self.read += piece
        end = match.end() + _length(self.read)
        request, self.read = self.read[:end], self.read[end:]
        return request

    def answer(self, status: str = "200 OK", body: bytes = b"{}", *headers: str) -> None:
        """Send a whole answer."""
        lines = "".join(f"{line}\r\n" for line in headers)
        self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def drip(self, data: bytes, seconds: float) -> None:
        """Send one byte every *seconds*, over and over, until the client has enough."""
        with contextlib.suppress(OSError):
            while True:
                for number in data:
                    self.sock.sendall(bytes([number]))
                    if self.stopping.wait(seconds):
                        return

    def reset(self) -> None:
        """End the connection with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def hang(self) -> None:
        """Do nothing until the client leaves or the test ends."""
        self.sock.settimeout(0.05)
        while not self.stopping.is_set():
            try:
                if not self.sock.recv(65536):
                    return
            except TimeoutError:
                continue
            except OSError:
                return


class RawServer:
    """A listening server; `requests` are those that handlers read, `received` every byte of every connection."""

    def __init__(self, handle: Callable[[Peer], None], tls: ssl.SSLContext | None) -> None:
        self._handle = handle
        self._tls = tls
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/api"
        self.connections = 0
        self.peers: list[Peer] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
            return
        peer = Peer(sock, self._stopping)
        self.peers.append(peer)
        with contextlib.suppress(OSError), sock:
            self._handle(peer)

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(patience())
        for thread in self._threads:
            thread.join(patience())


@contextlib.contextmanager
def raw_server(handle: Callable[[Peer], None], *, tls: ssl.SSLContext | None = None) -> Iterator[RawServer]:
    """A server whose every connection is handled by *handle* in a thread of its own, until the block ends."""
    server = RawServer(handle, tls)
    try:
        yield server
    finally:
        server.close()


def _length(head: bytes) -> int:
    match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(match[1]) if match else 0
