"""Download from a server that truncates, redirects, fails and lies; find files locally."""

import gzip
import hashlib
import http.server
import io
import os
import re
import threading
from pathlib import Path

import pytest
import requests
import urllib3
from conftest import ROOT, write_recipe
from test_archives import archive

from encourage_mt import processes
from encourage_mt.data import download as downloads
from encourage_mt.data.download import download
from encourage_mt.data.sizing import choose
from encourage_mt.data.sources import Sources
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe

CONTENT = bytes(range(256)) * 2000
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
SIZE = f"bytes:{len(CONTENT)}"
CHANGED = CONTENT[::-1]
CHANGED_CHECKSUM = f"md5:{hashlib.md5(CHANGED).hexdigest()}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes} and records `requests`.

    `faults` {path: [one for each request]}: an address to redirect to, a status, how many bytes are left out
    (negative), or headers {name: value} to send in place of the right ones (value None: not sent).
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.etag = {}, {}, [], '"1"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        fault = server.faults[self.path].pop(0) if server.faults.get(self.path) else None
        if isinstance(fault, str):
            self.answer(302, {"Location": fault})
            return
        content = server.files.get(self.path)
        if content is None or (isinstance(fault, int) and fault > 0):
            self.answer(fault or 404, {})
            return
        start = int(re.match(r"bytes=(\d+)-", asked).group(1)) if asked else 0
        if asked and self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(content) > 0:
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[start:]
        headers = {"ETag": server.etag, "Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status = 206 if start else 200
        if isinstance(fault, dict):
            status = fault.pop("status", status)
            headers |= fault
        self.answer(status, headers, body[:fault] if isinstance(fault, int) else body)

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    with Server() as httpd:
        httpd.files["/a.tgz"] = CONTENT
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock"))


def test_download_follows_redirect_and_leaves_only_the_file(server, tmp_path):
    server.faults["/moved.tgz"] = [f"{server.url}/a.tgz"]
    download([f"{server.url}/moved.tgz"], tmp_path / "raw" / "a.tgz", [CHECKSUM])
    assert (tmp_path / "raw" / "a.tgz").read_bytes() == CONTENT
    assert files_in(tmp_path / "raw") == ["a.tgz"]


@pytest.mark.parametrize("checksums", [[CHECKSUM], [SIZE], []], ids=["hash", "size", "none"])
def test_download_resumes_after_connection_loss(checksums, server, tmp_path):
    server.faults["/a.tgz"] = [1000 - len(CONTENT), 500, -3000]
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", checksums)
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT
    end = len(CONTENT) - 3000
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=1000-", f"bytes={end}-"]


@pytest.mark.parametrize(
    "held, asked",
    [(CONTENT[:1000], ["bytes=1000-"]), (CONTENT, []), (b"?", ["bytes=1-", None])]
    + [(size * b"?", [f"bytes={size}-", None]) for size in (len(CONTENT), len(CONTENT) + 5)],
    ids=["beginning", "whole", "other beginning", "other file", "longer file"],
)
def test_download_resumes_the_part_of_a_killed_run(held, asked, server, tmp_path):
    (tmp_path / "a.tgz.0.part").write_bytes(held)
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert server.requests == [("/a.tgz", item) for item in asked]
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT


@pytest.mark.parametrize("checksums", [[], [SIZE]])
def test_part_of_a_killed_run_is_dropped_without_a_hash(checksums, server, tmp_path):
    (tmp_path / "a.tgz.0.part").write_bytes(b"of last year's file")
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", checksums)
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT


@pytest.mark.parametrize("checksums", [[CHANGED_CHECKSUM], []], ids=["hash", "none"])
@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ETag": '"1"', "status": 200},
        {"status": 206, "Content-Range": "bytes 452000-511999/512000"},
        {"status": 206, "Content-Range": "bytes 7-511999/512000"},
        {"status": 206, "Content-Range": None},
        {"ETag": None},
    ],
)
def test_file_that_changes_between_attempts_is_downloaded_again(answer, checksums, server, tmp_path, monkeypatch):
    server.faults["/a.tgz"] = [-60_000, dict(answer)]

    def change(seconds):
        server.files["/a.tgz"], server.etag = CHANGED, '"2"'

    monkeypatch.setattr(downloads.time, "sleep", change)
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", checksums)
    assert (tmp_path / "a.tgz").read_bytes() == CHANGED


def test_file_truncated_between_attempts_is_downloaded_again(server, tmp_path, monkeypatch):
    server.faults["/a.tgz"] = [-60_000]
    monkeypatch.setattr(downloads.time, "sleep", lambda _: server.files.update({"/a.tgz": CHANGED[:-60_000]}))
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert (tmp_path / "a.tgz").read_bytes() == CHANGED[:-60_000]


@pytest.mark.parametrize(
    "checksums, asked", [([], [None, "bytes=452000-", None]), ([CHECKSUM], [None, "bytes=452000-"])]
)
def test_a_rest_of_unknown_length_is_not_taken_for_the_end_without_a_hash(checksums, asked, server, tmp_path):
    server.faults["/a.tgz"] = [-60_000, {"Content-Range": "bytes 452000-511999/*"}]
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", checksums)
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT
    assert [range for _, range in server.requests] == asked


def test_a_file_of_comments_is_not_searched_for_ever(tmp_path):
    """A pattern that backtracks would take a day for 40 comments."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"<!---->" * 40 + b"x")
    assert not downloads.is_html(path)
    path.write_bytes(b"<!---->" * 40 + b"<html>")
    assert downloads.is_html(path)


def test_weak_etag_does_not_identify_a_version(server, tmp_path):
    server.etag = 'W/"1"'
    server.faults["/a.tgz"] = [-60_000]
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert [asked for _, asked in server.requests] == [None, None]


PAGE = b"<html><body>log in</body></html>"


@pytest.mark.parametrize(
    "content, answer, expected",
    [
        (b"", {}, "empty"),
        (PAGE, {}, "web page"),
        (b"\xef\xbb\xbf \n<!DOCTYPE HTML>\n", {}, "web page"),
        (b"<!-- moved -->\n" + PAGE, {}, "web page"),
        (b'<?xml version="1.0"?><!-- a --> <!-- b -->' + PAGE, {}, "web page"),
        (CONTENT, {"Content-Length": "abc"}, "how long"),
        (CONTENT, {"Content-Length": None}, "how long"),
        (CONTENT, {"Content-Length": "-5"}, "how long"),
        (CONTENT, {"Content-Length": str(len(CONTENT) + 1)}, "after 5 attempts"),
        (CONTENT, {"status": 206, "Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}, "206"),
        (CONTENT, {"status": 203}, "203"),
    ],
)
def test_incomplete_file_is_refused_without_a_checksum(content, answer, expected, server, tmp_path):
    server.files["/a.tgz"] = content
    server.faults["/a.tgz"] = [dict(answer) for _ in range(downloads.ATTEMPTS)]
    with pytest.raises(UserError, match=expected):
        download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert not (tmp_path / "a.tgz").exists()


def test_checksum_makes_up_for_a_missing_length(server, tmp_path):
    server.faults["/a.tgz"] = [{"Content-Length": None}]
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])


def test_bytes_are_stored_unchanged(server, tmp_path):
    server.files["/a.tgz"] = packed = gzip.compress(CONTENT)
    server.faults["/a.tgz"] = [{"Content-Encoding": "x-gzip"}]  # as some servers label a .tgz
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert (tmp_path / "a.tgz").read_bytes() == packed


def test_redirect_from_https_to_http_is_refused(tmp_path, monkeypatch):
    def answer(url, **options):
        first, last = requests.Response(), requests.Response()
        first.url, last.url, last.status_code, last.history = url, "http://elsewhere/a.tgz", 200, [first]
        last.headers["Content-Length"] = "3"
        last.raw = urllib3.HTTPResponse(io.BytesIO(b"abc"), preload_content=False)
        return last

    monkeypatch.setattr(downloads.requests, "get", answer)
    with pytest.raises(UserError, match="http://elsewhere/a.tgz"):
        download(["https://here/a.tgz"], tmp_path / "a.tgz", [])
    download(["http://here/a.tgz"], tmp_path / "a.tgz", [])
    assert (tmp_path / "a.tgz").read_bytes() == b"abc"


def test_mirrors_are_tried_in_order(server, tmp_path):
    server.files["/corrupt.tgz"] = CONTENT[:-1] + b"?"
    server.faults["/busy.tgz"] = [503] * 9
    server.files["/slow.tgz"] = CONTENT
    server.faults["/slow.tgz"] = [-60_000] * 9
    names = ["gone", "busy", "corrupt", "slow", "a", "never"]
    urls = ["ftp://127.0.0.1/a.tgz", *(f"{server.url}/{name}.tgz" for name in names)]
    download(urls, tmp_path / "a.tgz", ["md5:" + "0" * 32, CHECKSUM])
    assert files_in(tmp_path) == ["a.tgz"]
    asked = list(dict.fromkeys(path for path, _ in server.requests))
    assert asked == [f"/{name}.tgz" for name in names[:-1]]


def test_reason_for_each_address_is_given(server, tmp_path):
    server.files["/corrupt.tgz"] = b"other"
    server.faults["/busy.tgz"] = [500] * 9
    urls = [f"{server.url}/{name}.tgz" for name in ("gone", "busy", "corrupt")] + ["http://127.0.0.1:1/a.tgz"]
    with pytest.raises(UserError) as error:
        download(urls, tmp_path / "a.tgz", [CHECKSUM])
    for words in ("HTTP 404", "HTTP 500, after 5 attempts", CHECKSUM, "ConnectionError", "--raw-dir"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and files_in(tmp_path) == []


def test_only_one_process_downloads_into_a_folder(server, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0)
    with processes.locked(tmp_path), pytest.raises(UserError, match=str(tmp_path)):
        download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_full_disk_is_reported(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match="No space left"):
        download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert not (tmp_path / "a.tgz").exists()


# --- where the files of a recipe come from


def sources_of(tmp_path, raw_dir=None, **data):
    data = {"train": ["a.tgz:x/t.de", "a.tgz:x/t.en"], "valid": ["v.de", "v.en"], "test": ["v.de", "v.en"]} | data
    recipe = load_recipe(write_recipe(tmp_path, name="tiny_de_en", data=data))
    return Sources(recipe, raw_dir, tmp_path / "downloads")


def test_local_files_are_found_in_the_folder_or_its_subfolder_of_the_corpus(tmp_path):
    (tmp_path / "tiny" / "x").mkdir(parents=True)
    archive(tmp_path / "tiny" / "a.tgz", ("x/t.de", "eins\n"), ("x/t.en", "one\n"))
    for name, text in (("v.de", "zwei"), ("10:30.de", "drei"), ("t.de", "not that of the archive")):
        (tmp_path / name).write_text(f"{text}\n")
    sources = sources_of(tmp_path, tmp_path)
    paths = sources.collect(["a.tgz:x/t.de", "a.tgz:x/t.en", "v.de", "./10:30.de"], tmp_path / "out")
    assert [path.read_text() for path in paths.values()] == ["zwei\n", "drei\n", "eins\n", "one\n"]
    assert set(sources.used) == {"a.tgz", "v.de", "./10:30.de"}
    assert sources.used["v.de"]["checked"] == "no checksum is published"
    with pytest.raises(UserError, match="v.en: no such file"):
        sources.collect(["v.en"], tmp_path / "out")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        sources_of(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("local_first", [False, True])
def test_files_beside_the_recipe_are_preferred_to_a_download(local_first, tmp_path):
    held_out = {"held_out": {"valid": 1, "test": 1}, "columns": [1, 2]}
    data = [{"urls": ["https://example.org"], "train": ["a.tsv"], **held_out}, {"train": ["b.tsv"], **held_out}]
    data = data[::-1] if local_first else data
    sources = Sources(load_recipe(write_recipe(tmp_path, data=data)), None, tmp_path / "downloads")
    assert sources.choose() is sources.recipe.data[0]
    (tmp_path / "b.tsv").write_text("eins\tone\n")
    assert sources.choose().splits["train"] == [["b.tsv"]] and not sources.corpus.urls


def test_extracted_files_replace_their_archive(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "t.de").write_text("eins\n")
    paths = sources_of(tmp_path, tmp_path).collect(["a.tgz:x/t.de"], tmp_path / "out")
    assert list(paths.values()) == [tmp_path / "x" / "t.de"]
    archives, files = ({split: [name] for split in ("train", "valid", "test")} for name in ("a.tgz:x/t.de", "t.de"))
    chosen = Sources(load_recipe(write_recipe(tmp_path, data=[archives, files])), tmp_path, tmp_path).choose()
    assert chosen.splits["train"] == [["a.tgz:x/t.de"]], "the first alternative whose files are there"


def test_local_files_are_checked(tmp_path):
    (tmp_path / "v.de").write_text("zwei\n")
    wrong = {"v.de": "sha256:" + "0" * 64}
    with pytest.raises(UserError, match="v.de: is not the published file"):
        sources_of(tmp_path, tmp_path, checksums=wrong).collect(["v.de"], tmp_path / "out")
    (tmp_path / "v.de").write_text("<html>moved</html>")
    with pytest.raises(UserError, match="v.de: is a web page"):
        sources_of(tmp_path, tmp_path).collect(["v.de"], tmp_path / "out")


def test_downloads_are_reused_by_both_directions(server, tmp_path, capsys):
    server.files["/v.de"] = b"zwei\n"
    for name in ("tiny_de_en", "tiny_en_de"):
        data = {split: ["v.de", "v.en"] for split in ("train", "valid", "test")}
        data |= {"urls": [server.url], "checksums": {"v.de": "sha256:" + hashlib.sha256(b"zwei\n").hexdigest()}}
        turned = {"source": "en", "target": "de"} if name == "tiny_en_de" else {}
        recipe = load_recipe(write_recipe(tmp_path, name=name, data=data, **turned))
        paths = Sources(recipe, None, tmp_path / "downloads").collect(["v.de"], tmp_path / "out")
        assert paths["v.de"].read_text() == "zwei\n"
    assert len(server.requests) == 1
    assert "v.de: reused" in capsys.readouterr().out


def test_a_file_without_a_checksum_is_kept_if_it_is_whole_and_its_sha256_is_printed(server, tmp_path, capsys):
    """As the files of a site that adds to them: the second version is half an archive, with the right length."""
    content = archive(tmp_path / "a.zip", ("x.tsv", "eins\tone\n" * 99)).read_bytes()
    data = {"urls": [server.url], **dict.fromkeys(("train", "valid", "test"), ["a.zip:x.tsv"])}
    for served in (content, content[:-30]):
        server.files["/a.zip"] = served
        sources = sources_of(tmp_path, **data)
        if served == content:
            sources.collect(["a.zip:x.tsv"], tmp_path / "out")
        else:
            with pytest.raises(UserError, match="a.zip: damaged archive .*remove it"):
                sources.collect(["a.zip:x.tsv"], tmp_path / "out")
        digest = hashlib.sha256(served).hexdigest()
        out = capsys.readouterr().out
        assert "a.zip: no checksum in the recipe; " in out and f"sha256:{digest}" in out
        path = Path(sources.used["a.zip"]["path"])
        assert sources.used["a.zip"]["sha256"] == digest and path.parent.parent == tmp_path / "downloads"
        path.unlink()
        elsewhere = sources_of(tmp_path, **data | {"urls": ["http://127.0.0.1:9"]})
        with pytest.raises(UserError, match="a.zip"):  # it does not take the file of another address for its own
            elsewhere.collect(["a.zip:x.tsv"], tmp_path / "out")
    pinned = sources_of(tmp_path, **data, checksums={"a.zip": f"sha256:{hashlib.sha256(content).hexdigest()}"})
    with pytest.raises(UserError, match="but the recipe says sha256"):
        pinned.collect(["a.zip:x.tsv"], tmp_path / "out")


def test_files_of_a_recipe_are_beside_it_not_in_the_current_folder(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "test.tsv").write_text("eins\tone\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Sources(recipe, None, tmp_path).find_local("test.tsv") == tmp_path / "test.tsv"
    own = load_recipe(ROOT / "examples/own/recipe.yaml", "de", "en", ["test.tsv"], choose(0, 0))
    assert Sources(own, None, tmp_path).find_local("test.tsv").resolve() == tmp_path / "elsewhere" / "test.tsv"
