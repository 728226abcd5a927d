"""An S3 on loopback: what objects hold, in memory, by the calls that a client of object storage makes."""

import threading
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape


class Handler(BaseHTTPRequestHandler):
    """GET, HEAD, PUT, DELETE and ListObjectsV2, path-style."""

    protocol_version = "HTTP/1.1"

    def parse_request(self):
        """Read a request; one that comes while the server hangs is answered when it does not any more."""
        taken = super().parse_request()
        self.server.goes_on.wait()
        return taken

    def do_GET(self):
        parts = urlsplit(self.path)
        if "list-type=2" in parts.query:
            return self.listed(parts)
        name = unquote(parts.path)
        if self.server.hiccups > 0:
            self.server.hiccups -= 1
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if name in self.server.forbidden:
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if name in self.server.redirects:
            return self.answer(302, b"", {"Location": self.server.redirects[name]})
        if name not in self.server.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.answer(200, self.server.objects[name])

    do_HEAD = do_GET  # noqa: N815 (http.server names it)

    def do_PUT(self):
        if self.server.failing:
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        data = self.rfile.read(int(self.headers["content-length"]))
        self.server.objects[unquote(urlsplit(self.path).path)] = data
        return self.answer(200, b"")

    def do_DELETE(self):
        self.server.objects.pop(unquote(urlsplit(self.path).path), None)
        self.answer(204, b"")

    def do_POST(self):
        """DeleteObjects, which some clients send for one object, too."""
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        bucket = urlsplit(self.path).path.strip("/")
        keys = [part.partition("</Key>")[0] for part in body.split("<Key>")[1:]]
        for key in keys:
            self.server.objects.pop(f"/{bucket}/{unescape(key)}", None)
        told = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)  # as the real one, of what was not there, too
        self.answer(200, f'<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{told}</DeleteResult>'.encode())

    def listed(self, parts):
        bucket = parts.path.strip("/")
        prefix = parse_qs(parts.query).get("prefix", [""])[0]
        names = (name.removeprefix(f"/{bucket}/") for name in sorted(self.server.objects) if name.startswith(f"/{bucket}/"))
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            f"<Size>{len(self.server.objects[f'/{bucket}/{name}'])}</Size></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        self.answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode())

    def answer(self, status, body, headers=()):
        self.send_response(status)
        told = {
            "Content-Length": str(len(body)),
            "ETag": f'"{md5(body).hexdigest()}"',
            "Last-Modified": formatdate(usegmt=True),
        }
        for name, value in {**told, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def s3(monkeypatch):
    """A running S3 that every client finds by the environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects, server.redirects, server.failing = {}, {}, False
    server.hiccups, server.forbidden = 0, set()
    server.handle_error = lambda *_: None  # who waited for an answer went away
    server.goes_on = threading.Event()
    server.goes_on.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "ALLOW_HTTP": "true",
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()
