"""Files of a shard folder, here or on a web server, that nobody vouches for.

Opened without a shell, by http(s) and as plain files alone, and read no further than expected: a
server may answer without end or send us elsewhere, and a pipe or device may lie in the folder.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import IO, BinaryIO, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from kdad_dist.errors import DataError
from kdad_dist.wording import beside

log = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT = 30  # seconds without an answer
PAUSES = (1.0, 5.0)
"""Seconds between the tries to read from a server: it may just be starting anew."""
MAX_INDEX = 2**30
"""Bytes of an index file, beyond which it is not one: some two million samples."""
REMEDY = "give the folder that `kdad pack` wrote, or its http address"


class FolderMissing(DataError):
    """There is no such folder, which is another thing than a damaged one."""


def is_remote(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def fetch(root: str, name: str, most: int = MAX_INDEX) -> bytes:
    """The whole content of a file of the shard folder.

    Raises:
        FolderMissing: the folder does not exist.
        DataError: the file cannot be read, or has more than `most` bytes.
    """
    where = join(root, name)
    try:
        with open_remote(where) if is_remote(root) else open_file(where) as file:
            content = file.read(most + 1)
    except (OSError, HTTPException) as error:
        if isinstance(error, FileNotFoundError) and not Path(root).exists():
            near = beside(Path(root), "*/index.json")
            raise FolderMissing(f"{root} does not exist", f"{near}{REMEDY}") from None
        raise DataError(f"{where} cannot be read: {error}", REMEDY) from None
    if len(content) > most:
        raise DataError(f"{where} has more than {most:,} bytes", "copy or pack the shards again")
    return content


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Raises OSError for pipes, which nobody may ever write to, and devices, which may not end."""
    if not Path(path).is_file() and Path(path).exists():
        raise OSError(errno.EINVAL, "it is a folder, pipe or device, not a file", os.fspath(path))
    return open(path, "rb", buffering=buffering)


def open_remote(address: str, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """The server's answer, of which to read no more than is expected.

    Raises:
        OSError, HTTPException: there is no such file, no server, or no sense in its answer.
    """
    # The address is one of http: `is_remote`, and `_OnlyHttp` for where that leads to.
    try:
        request = Request(address, headers=dict(headers or {}))  # noqa: S310
        return build_opener(_OnlyHttp).open(request, timeout=TIMEOUT)
    except ValueError as error:
        raise URLError(f"{address} is no address: {error}") from None


def patiently(address: str, work: Callable[[], T]) -> T:
    """What `work` read of a file; a server is asked again after what may pass.

    A training of days should not end by one lost connection.
    """
    for pause in PAUSES if is_remote(address) else ():
        try:
            return work()
        except (OSError, HTTPException) as error:
            if not may_pass(error):
                raise
            log.warning("%s: %s; asked again in %g s", address, error, pause)
        time.sleep(pause)
    return work()


def may_pass(error: OSError | HTTPException) -> bool:
    """Whether the next try may succeed: not where the server knows no such file, say."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in {408, 429}  # too slow, too much asked
    return not isinstance(error, URLError) or isinstance(error.reason, OSError)


def read_of(stream: IO[bytes] | HTTPResponse, size: int) -> bytes:
    """So many bytes, or fewer at the end of the file.

    Raises:
        IncompleteRead: the server had announced more; the connection was cut.
    """
    data = stream.read(size)
    if len(data) < size and isinstance(stream, HTTPResponse) and stream.length:
        raise IncompleteRead(data, stream.length)
    return data


class _OnlyHttp(HTTPRedirectHandler):
    """Python's own handler would also go from a web server to ftp."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not is_remote(newurl):
            raise URLError(f"the server sends us on to {newurl}, which is not read")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
