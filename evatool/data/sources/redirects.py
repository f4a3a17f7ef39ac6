"""Web addresses opened with care about where a redirect leads.

A recipe may name any address. A redirect is the word of another machine, and could make this one ask a service that
trusts it: a neighbour behind the firewall, a daemon on the loopback interface, a cloud's metadata. So every hop is
resolved once, the addresses are judged, and the connection goes to an address that was judged:

    redirect to             without data.remote.allow_private_redirects
    a public address        followed
    the same host and port  followed
    a private network       followed from within a private network, else refused
    loopback, link-local    refused
    not http or https       refused, always

Where the environment names a proxy, it is the proxy that connects, and names that only it can resolve are its to judge.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import urllib.request
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedRedirectError(Exception):
    """A redirect leads where a recipe's words do not."""


def open_url(url: str, timeout_sec: float, *, allow_private: bool) -> http.client.HTTPResponse:
    """The answer to a GET request for an `http` or `https` URL, after redirects.

    Args:
        timeout_sec: for connecting and for each wait for bytes.
        allow_private: follow redirects to any address.
    Raises: RefusedRedirectError; otherwise what `urllib.request` raises.
    """
    way = Way(allow_private)
    opener = urllib.request.build_opener(_Handler(way), _Redirects())
    url, user = _without_user(url)
    request = urllib.request.Request(url, headers={"User-Agent": "evatool", "Accept-Encoding": "identity"})
    if user:
        # Not one of `headers`, which a redirect would take along to another server.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    response: http.client.HTTPResponse = opener.open(request, timeout=timeout_sec)
    return response


def _without_user(url: str) -> tuple[str, str]:
    """A URL without `user:password@`, and these two."""
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    return (urlunsplit(parts._replace(netloc=place)), unquote(user)) if at else (url, "")


def kind_of(address: Address) -> str:
    """Where an address leads: "public", "private" (a network of one's own), or "local" (this machine, or its link)."""
    address = _unwrapped(address)
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        return "local"
    return "public" if address.is_global else "private"


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


class Way:
    """The hops of one request: where it has been, and where it may go."""

    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private
        self.asked = ""
        """Host and port of the URL that is being opened, before a proxy takes their place."""
        self._visited: set[tuple[str, int]] = set()
        self._kinds: set[str] = set()

    def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host to which the next connection may go. Raises: RefusedRedirectError; OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
        kinds = {kind_of(ipaddress.ip_address(address.partition("%")[0])) for address in addresses}
        hop = (host.lower(), port)
        is_redirect = bool(self._visited)
        if is_redirect and not self.allow_private and hop not in self._visited:
            allowed = {"public", "private"} if self._kinds == {"private"} else {"public"}
            if not kinds <= allowed:
                raise RefusedRedirectError(
                    f"a redirect to {host}:{port} ({', '.join(addresses)}) leads to this machine or into its network; "
                    "set data.remote.allow_private_redirects = true where that is meant"
                )
        self._visited.add(hop)
        self._kinds |= kinds
        return addresses

    def check_proxied(self, scheme: str) -> None:
        """Judge the address to which a proxy connects, as far as it can be resolved here."""
        place = urlsplit(f"//{self.asked}")
        host, port = place.hostname or "", place.port or _PORTS[scheme]
        try:
            self.addresses(host, port)
        except OSError:
            self._visited.add((host, port))
            self._kinds.add("public")


class _HttpConnection(http.client.HTTPConnection):
    """A connection to an address that was judged, and not to what a second look-up may say."""

    way: Way | None = None
    """None where the connection is to a proxy."""

    def connect(self) -> None:
        if self.way is None:
            super().connect()
            return
        host = self.host
        addresses = self.way.addresses(host, self.port)
        for number, address in enumerate(addresses, 1):
            try:
                self.host = address
                super().connect()
                return
            except OSError:
                if number == len(addresses):
                    raise
            finally:
                self.host = host  # the name, for the certificate


class _HttpsConnection(http.client.HTTPSConnection, _HttpConnection):
    """The same with TLS: `HTTPSConnection.connect` calls that of `_HttpConnection` and then checks the name."""


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens what is not redirected, each hop by a connection of its own."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self._way = way

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        self._way.asked = request.host
        return super().http_request(request)

    https_request = http_request

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._connect(_HttpConnection, req, "http")

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._connect(_HttpsConnection, req, "https")

    def _connect(
        self, kind: type[_HttpConnection], request: urllib.request.Request, scheme: str
    ) -> http.client.HTTPResponse:
        is_proxied = request.host != self._way.asked
        if is_proxied:
            self._way.check_proxied(scheme)

        def connection(host: str, **options: Any) -> _HttpConnection:
            made = kind(host, **options)
            made.way = None if is_proxied else self._way
            return made

        return self.do_open(connection, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Leaves out every redirect that is not to a web address; where the others lead is judged on connecting."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        fp.close()  # its body, which may be without end, would be read
        target = urljoin(req.full_url, headers.get("location") or headers.get("uri") or "")
        if urlsplit(target).scheme not in _PORTS:
            raise RefusedRedirectError(f"a redirect to {urlsplit(target).scheme}:// is not followed")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
