"""Requests over HTTP and HTTPS only, through the proxies of the environment; redirects lead nowhere else."""

import ssl
from http.client import HTTPMessage
from typing import IO
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from deepcluster.core.addresses import is_web, shown
from deepcluster.core.retry import Refused

MOST_REDIRECTS = 10


class Redirects(HTTPRedirectHandler):
    """Redirects within HTTP and HTTPS; into plain HTTP only where a whole sum shows what anyone on the way has changed."""

    def __init__(self, *, is_checked: bool) -> None:
        self.is_checked = is_checked

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        passed = [*getattr(req, "passed", []), req.full_url]
        chain = " → ".join(shown(one) for one in [*passed, newurl])
        if newurl in passed or len(passed) > MOST_REDIRECTS:
            what = "goes in a circle" if newurl in passed else f"has more than {MOST_REDIRECTS} steps"
            raise Refused(f"{shown(passed[0])} can't be read: its redirection {what}: {chain}")
        if not is_web(newurl):
            raise Refused(f"{shown(passed[0])} can't be read: it is redirected to what is no address of HTTP: {chain}")
        if req.full_url.lower().startswith("https:") and newurl.lower().startswith("http:") and not self.is_checked:
            raise Refused(
                f"{shown(passed[0])} is not read: it is redirected from https to plain http, where the file could be "
                f"replaced on its way, and its sum is not known: {chain}"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.passed = passed  # type: ignore[attr-defined]
        return request


def opener_of_web(*, is_checked: bool) -> OpenerDirector:
    """Return an opener of HTTP and HTTPS only: no local files, no FTP."""
    opener = OpenerDirector()
    secure = HTTPSHandler(context=ssl.create_default_context())
    handlers = (ProxyHandler(), HTTPHandler(), secure, HTTPDefaultErrorHandler(), HTTPErrorProcessor())
    for handler in (*handlers, Redirects(is_checked=is_checked)):
        opener.add_handler(handler)
    return opener
