"""Content-Digest (RFC 9530): a body is what its sender says that it is."""

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from hashlib import sha256

from service.errors import DigestError

_SHA_256 = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/=]*):\s*(?:;[^,]*)?(?=,|$)")


def content_digest(body: bytes) -> str:
    """Return the Content-Digest of a body."""
    return digest_header(sha256(body).digest())


def digest_header(digest: bytes) -> str:
    """Return the Content-Digest of a body by its sha256."""
    return f"sha-256=:{b64encode(digest).decode()}:"


def require_digest(body: bytes, header: str) -> str:
    """Check a body against its Content-Digest and return its sha256 in hex.

    Raises:
        DigestError: the header has no sha-256, or another one than the body.
    """
    found = _SHA_256.search(header)
    try:
        declared = b64decode(found[1], validate=True) if found else b""
    except Base64Error:
        declared = b""
    if len(declared) != sha256().digest_size:
        raise DigestError("Content-Digest must give the body's sha-256: sha-256=:<base64 of the 32 bytes>:")
    digest = sha256(body)
    if digest.digest() != declared:
        raise DigestError(f"the body's sha256 is {digest.hexdigest()}, Content-Digest says {declared.hex()}: send it again")
    return digest.hexdigest()
