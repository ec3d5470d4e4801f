"""Downloads that go on where they broke off, try mirrors in order, and leave either the whole file or none."""

import os
import time
from pathlib import Path

import requests
from tqdm import tqdm

from ..errors import UserError
from ..files import file_hash

ATTEMPTS = 5  # per address
FIRST_PAUSE = 1.0  # seconds, doubled with every further attempt
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 16  # bytes; what a broken connection loses at most
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class _Refused(Exception):
    """An address that more attempts will not mend."""


def download(urls: list[str], path: Path, checksums: list[str]) -> str:
    """Fetch the first of `urls` that serves a file with one of `checksums` ("sha256:..." or "md5:...") to `path`.

    Without checksums any file is taken that is no HTML page. What is unfinished lies beside as *.part; where there is a
    checksum to judge the whole by, a later run goes on from there. Returns the URL taken. Raises UserError with the
    reason for each address if all fail.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for number, url in enumerate(urls):
        part = path.with_name(f"{path.name}.{number}.part")  # mirrors need not serve the same bytes
        if not checksums:
            part.unlink(missing_ok=True)
        try:
            _fetch(url, part)
            _check(part, checksums)
        except _Refused as refused:
            reasons.append(f"{url}: {refused}")
            continue
        os.replace(part, path)
        return url
    raise UserError(f"{path.name} cannot be downloaded ({'; '.join(reasons)}); with the file at hand, use --raw-dir")


def matches(path: Path, checksums: list[str]) -> bool:
    """Whether the file has one of the checksums."""
    return any(file_hash(path, c.split(":")[0]) == c.split(":")[1] for c in checksums)


def is_html(path: Path) -> bool:
    """Whether a file that should be text or an archive is a web page: what dead addresses and logins serve."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _check(part, checksums):
    """Refuse, and remove, what is not the file wanted."""
    if is_html(part):
        reason = "a web page came instead of the file"
    elif checksums and not matches(part, checksums):
        reason = f"what came has sha256:{file_hash(part)}, published is {' or '.join(checksums)}"
    else:
        return
    part.unlink()
    raise _Refused(reason)


def _fetch(url, part):
    """The file at `url` in `part`, by as many attempts as it takes."""
    validator = None  # tells whether the server still has the file that `part` is the beginning of
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        held = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if held:
            headers |= {"Range": f"bytes={held}-"} | ({"If-Range": validator} if validator else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                if response.status_code == 416:  # nothing beyond what is held: whole, or of another file
                    if response.headers.get("Content-Range") == f"bytes */{held}":
                        return
                    part.unlink()
                    reason = "the part held is longer than the file"
                    continue
                if response.status_code in RETRIED:
                    reason = f"HTTP {response.status_code}"
                    continue
                if response.status_code not in (200, 206):
                    raise _Refused(f"HTTP {response.status_code} {response.reason}")
                validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
                _receive(response, part, held if response.status_code == 206 else 0)
            return
        except requests.RequestException as error:
            reason = f"{type(error).__name__} at byte {part.stat().st_size if part.exists() else 0:,}"
    raise _Refused(f"{reason}, after {ATTEMPTS} attempts")


def _receive(response, part, held):
    """Append the body to the `held` bytes of `part`. Raises requests' errors if it ends early."""
    total = held + int(response.headers.get("Content-Length", 0)) or None
    bar = tqdm(total=total, initial=held, unit="B", unit_scale=True, desc=part.name.rsplit(".", 2)[0], mininterval=1)
    with open(part, "ab" if held else "wb") as out, bar:
        for block in response.iter_content(BLOCK):
            out.write(block)
            bar.update(len(block))
