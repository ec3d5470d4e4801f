"""Download files: try mirrors in order, resume after a lost connection, keep only complete files."""

import os
import re
import time
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from ..errors import UserError
from ..files import file_hash
from ..processes import locked

ATTEMPTS = 5  # per address
FIRST_PAUSE = 1.0  # seconds, doubled with every further attempt
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 16  # bytes; a lost connection loses at most one block
RETRIED = {408, 425, 429, 500, 502, 503, 504}
HEAD = 1 << 16  # bytes looked at to recognize a web page


class _Refused(Exception):
    """The address does not serve the file, and another attempt would not help."""


class _Failed(Exception):
    """An attempt failed; another one may succeed. With `restart`, it begins at the first byte."""

    def __init__(self, reason: str, restart: bool = False):
        super().__init__(reason)
        self.restart = restart


def download(urls: list[str], path: Path, checksums: list[str], option: str = "--raw-dir") -> None:
    """Fetch a file with one of `checksums` from the first of `urls` that serves it and write it to `path`.

    A checksum is "sha256:...", "md5:..." or, weaker, "bytes:N". Without any, a file is accepted if the server says how
    long it is and it is not a web page. An unfinished download stays beside `path` as *.part; a later run resumes it if
    there is a hash to check the result with. Raises UserError with the reason for each address if all fail, which
    names the `option` for files that the user has, or if another process downloads into the same folder.
    """
    with locked(path.parent):
        parts = [path.with_name(f"{path.name}.{number}.part") for number in range(len(urls))]  # mirrors may differ
        reasons = []
        for url, part in zip(urls, parts, strict=True):
            try:
                _fetch(url, part, checksums)
            except _Refused as refused:
                reasons.append(f"{url}: {refused}")
                continue
            os.replace(part, path)
            for unfinished in parts:
                unfinished.unlink(missing_ok=True)
            return
    raise UserError(f"{path.name}: cannot be downloaded ({'; '.join(reasons)}); if you have the file, use {option}")


def matches(path: Path, checksums: list[str]) -> bool:
    """Return whether the file has one of the checksums."""
    return any(_checksum(path, checksum.partition(":")[0]) == checksum for checksum in checksums)


def _checksum(path, kind):
    return f"{kind}:{path.stat().st_size if kind == 'bytes' else file_hash(path, kind)}"


def is_html(path: Path) -> bool:
    """Return whether a file is a web page: dead addresses and logins serve one instead of the text or archive."""
    with open(path, "rb") as file:
        return bool(_HTML.match(file.read(HEAD)))


_HTML = re.compile(
    rb"\xef?\xbb?\xbf?(?:\s|<!--(?:(?!-->).)*-->|<\?xml(?:(?!\?>).)*\?>)*<(?:!doctype\s+html|html|head|body)\b",
    re.I | re.S,
)


def _fetch(url, part, checksums):
    """Download `url` to `part` in up to ATTEMPTS attempts. Raises _Refused."""
    has_hash = any(not checksum.startswith("bytes:") for checksum in checksums)
    if has_hash and part.exists() and matches(part, checksums):
        return
    validator = None  # identifies the version of the file whose first bytes `part` holds
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        if not has_hash and not validator:  # nothing would tell whether the rest belongs to the same version
            part.unlink(missing_ok=True)
        held = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if held:
            headers |= {"Range": f"bytes={held}-"} | ({"If-Range": validator} if validator else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                start, total = _check_response(response, held, validator, bool(checksums))
                validator = _validator(response)
                _receive(response, part, start, total)
            _check_content(part, checksums, resumed=start > 0)
            return
        except _Failed as failed:
            reason = str(failed)
            if failed.restart:
                part.unlink(missing_ok=True)
                validator = None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ValueError):  # an address that is malformed or of another kind than http
                raise _Refused(" ".join(str(error).split())) from None
            reason = f"{type(error).__name__} at byte {part.stat().st_size if part.exists() else 0:,}"
        except OSError as error:  # of a full disk, which names no file
            error.filename = error.filename or str(part)
            raise
    raise _Refused(f"{reason}, after {ATTEMPTS} attempts")


def _validator(response):
    """Return the ETag, or the time of the last change, of the file served; None if the server sends no reliable one."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _check_response(response, held, validator, has_checksum):
    """Return (first byte, length of the whole file or None) of a response that can be used.

    held, validator: the number of bytes we have, and the version of the file they belong to.
    """
    status, headers = response.status_code, response.headers
    hops = [hop.url for hop in (*response.history, response)]
    if any(old.startswith("https:") and not new.startswith("https:") for old, new in zip(hops, hops[1:], strict=False)):
        raise _Refused(f"redirects from https to {hops[-1]}")
    if status in RETRIED:
        raise _Failed(f"HTTP {status}")
    if status == 416:  # we have as many bytes as the file, or more, and they are not the right ones
        raise _Failed("HTTP 416: the part already downloaded is not the beginning of the file", restart=True)
    if status == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("Content-Range", ""))
        if not held or not match or int(match[1]) != held:
            raise _Failed("HTTP 206 with another part of the file than requested", restart=True)
        if validator and _validator(response) != validator:
            raise _Failed("the file changed during the download", restart=True)
        if match[2] == "*" and not has_checksum:
            raise _Failed("HTTP 206 that does not say how long the file is", restart=True)
        return held, int(match[2]) if match[2] != "*" else None
    if status != 200:
        raise _Refused(f"HTTP {status} {response.reason}")
    length = headers.get("Content-Length", "")
    total = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    if total is None and not has_checksum and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise _Refused("the server does not say how long the file is, and the recipe has no checksum")
    return 0, total


def _receive(response, part, start, total):
    """Write the body to `part` from byte `start` on. Raises _Failed or an error of urllib3 if it ends early."""
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.name.rsplit(".", 2)[0], mininterval=1)
    with open(part, "ab" if start else "wb") as out, bar:
        for block in response.raw.stream(BLOCK, decode_content=False):  # decoded, a .tgz may become a .tar
            out.write(block)
            bar.update(len(block))
    size = part.stat().st_size
    if total is not None and size != total:
        raise _Failed(f"got {size:,} of {total:,} bytes", restart=size > total)


def _check_content(part, checksums, resumed):
    """Remove and refuse a file that is not the expected one; if it was resumed, another attempt may help."""
    if not part.stat().st_size:
        reason = "the file is empty"
    elif is_html(part):
        reason = "got a web page instead of the file"
    elif checksums and not matches(part, checksums):
        kinds = dict.fromkeys(checksum.partition(":")[0] for checksum in checksums)
        got = ", ".join(_checksum(part, kind) for kind in kinds)
        reason = f"got a file with {got}, but the recipe says {' or '.join(checksums)}"
    else:
        return
    if resumed:
        raise _Failed(reason, restart=True)
    part.unlink()
    raise _Refused(reason)
