"""Downloads against a server that truncates, redirects, fails and lies; archives; files at hand."""

import hashlib
import http.server
import os
import re
import threading

import grammar
import pytest
from conftest import run, write_recipe
from test_archives import archive

from encourage_mt.data import download as downloads
from encourage_mt.data.download import download
from encourage_mt.data.prepare import prepare
from encourage_mt.data.sources import Sources
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe

CONTENT = bytes(range(256)) * 2000
BLOCK = downloads.BLOCK
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; notes `requests`.

    `faults` {path: [one for each request]}: another address, a status, or (negative) how many bytes are left out.
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
        if isinstance(fault, str):  # elsewhere
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        if fault and fault > 0:
            self.send_error(fault)
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(re.match(r"bytes=(\d+)-", asked).group(1)) if asked else 0
        if asked and self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:fault] if fault else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    with Server() as httpd:
        httpd.files["/a.tgz"] = CONTENT
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_a_file_is_fetched_through_a_redirect_and_nothing_else_is_left(server, tmp_path):
    server.faults["/moved.tgz"] = [f"{server.url}/a.tgz"]
    assert download([f"{server.url}/moved.tgz"], tmp_path / "raw" / "a.tgz", [CHECKSUM])
    assert (tmp_path / "raw" / "a.tgz").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "raw") == ["a.tgz"]


def test_what_breaks_off_is_gone_on_with(server, tmp_path):
    server.faults["/a.tgz"] = [2 * BLOCK + 5 - len(CONTENT), 500, -BLOCK + 5]
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, *[f"bytes={2 * BLOCK}-"] * 2, f"bytes={6 * BLOCK}-"]


def test_a_later_run_goes_on_where_a_killed_one_stopped(server, tmp_path):
    (tmp_path / "a.tgz.0.part").write_bytes(CONTENT[:1000])
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert server.requests == [("/a.tgz", "bytes=1000-")]
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT


@pytest.mark.parametrize("held", [CONTENT, CONTENT + b"more"], ids=["whole", "too long"])
def test_a_part_that_reaches_the_end_is_judged_not_appended_to(held, server, tmp_path):
    (tmp_path / "a.tgz.0.part").write_bytes(held)
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT


def test_without_a_checksum_an_old_part_is_not_trusted(server, tmp_path):
    (tmp_path / "a.tgz.0.part").write_bytes(b"of last year's file")
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT


def test_a_file_that_changes_in_between_is_begun_anew(server, tmp_path, monkeypatch):
    server.faults["/a.tgz"] = [-60_000]
    changed = CONTENT[::-1]

    def change(seconds):
        server.files["/a.tgz"], server.etag = changed, '"2"'

    monkeypatch.setattr(downloads.time, "sleep", change)
    download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [])
    assert (tmp_path / "a.tgz").read_bytes() == changed


def test_mirrors_are_tried_in_order(server, tmp_path):
    server.files["/corrupt.tgz"] = CONTENT[:-1] + b"?"
    server.files["/page.tgz"] = b"\n<!DOCTYPE html><title>moved</title>"
    server.faults["/busy.tgz"] = [503] * 9
    names = ["gone", "busy", "page", "corrupt", "a", "never"]
    taken = download([f"{server.url}/{name}.tgz" for name in names], tmp_path / "a.tgz", ["md5:" + "0" * 32, CHECKSUM])
    assert taken.endswith("/a.tgz") and os.listdir(tmp_path) == ["a.tgz"]
    asked = [path for path, _ in server.requests]
    assert asked == ["/gone.tgz", *["/busy.tgz"] * downloads.ATTEMPTS, "/page.tgz", "/corrupt.tgz", "/a.tgz"]


def test_if_all_fail_each_reason_is_told_and_no_file_is_left(server, tmp_path):
    server.files["/corrupt.tgz"] = b"other"
    server.files["/page.tgz"] = b"<html>log in</html>"
    server.faults["/busy.tgz"] = [500] * 9
    urls = [f"{server.url}/{name}.tgz" for name in ("gone", "busy", "page", "corrupt")] + ["http://127.0.0.1:1/a.tgz"]
    with pytest.raises(UserError) as error:
        download(urls, tmp_path / "a.tgz", [CHECKSUM])
    for words in (
        "HTTP 404",
        "HTTP 500, after 5 attempts",
        "a web page came",
        CHECKSUM,
        "ConnectionError",
        "--raw-dir",
    ):
        assert words in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_is_told(server, tmp_path):
    (tmp_path / "a.tgz.0.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        download([f"{server.url}/a.tgz"], tmp_path / "a.tgz", [CHECKSUM])
    assert not (tmp_path / "a.tgz").exists()


# --- where a recipe's files come from


def sources_of(tmp_path, raw_dir=None, **data):
    data = {"train": ["a.tgz:x/t.de", "a.tgz:x/t.en"], "valid": ["v.de", "v.en"], "test": ["v.de", "v.en"]} | data
    recipe = load_recipe(write_recipe(tmp_path, name="tiny_de_en", data=data))
    return Sources(recipe, raw_dir, tmp_path / "downloads")


def test_files_at_hand_are_found_in_the_folder_or_that_of_the_corpus(tmp_path):
    (tmp_path / "tiny" / "x").mkdir(parents=True)
    archive(tmp_path / "tiny" / "a.tgz", ("x/t.de", "eins\n"), ("x/t.en", "one\n"))
    (tmp_path / "v.de").write_text("zwei\n")
    sources = sources_of(tmp_path, tmp_path)
    paths = sources.files(["a.tgz:x/t.de", "a.tgz:x/t.en", "v.de"], tmp_path / "out")
    assert [path.read_text() for path in paths.values()] == ["zwei\n", "eins\n", "one\n"]
    assert set(sources.found) == {"a.tgz", "v.de"} and sources.found["v.de"]["checked"] == "no checksum is published"
    with pytest.raises(UserError, match="v.en: no such file"):
        sources.files(["v.en"], tmp_path / "out")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        sources_of(tmp_path, tmp_path / "nowhere")


def test_extracted_files_do_in_place_of_their_archive(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "t.de").write_text("eins\n")
    paths = sources_of(tmp_path, tmp_path).files(["a.tgz:x/t.de"], tmp_path / "out")
    assert list(paths.values()) == [tmp_path / "x" / "t.de"]


def test_files_at_hand_are_checked(tmp_path):
    (tmp_path / "v.de").write_text("zwei\n")
    wrong = {"v.de": "sha256:" + "0" * 64}
    with pytest.raises(UserError, match="v.de: is not the published file"):
        sources_of(tmp_path, tmp_path, checksums=wrong).files(["v.de"], tmp_path / "out")
    (tmp_path / "v.de").write_text("<html>moved</html>")
    with pytest.raises(UserError, match="v.de: a web page"):
        sources_of(tmp_path, tmp_path).files(["v.de"], tmp_path / "out")


def test_a_second_run_reuses_downloads_and_both_directions_share_them(server, tmp_path, capsys):
    server.files["/v.de"] = b"zwei\n"
    for name in ("tiny_de_en", "tiny_en_de"):
        data = {split: ["v.de", "v.de"] for split in ("train", "valid", "test")}
        data |= {"urls": [server.url], "checksums": {"v.de": "sha256:" + hashlib.sha256(b"zwei\n").hexdigest()}}
        turned = {"source": "en", "target": "de"} if name == "tiny_en_de" else {}
        recipe = load_recipe(write_recipe(tmp_path, name=name, data=data, **turned))
        paths = Sources(recipe, None, tmp_path / "downloads").files(["v.de"], tmp_path / "out")
        assert paths["v.de"].read_text() == "zwei\n"
    assert len(server.requests) == 1
    assert "v.de: reused" in capsys.readouterr().out


def test_a_recipe_downloads_and_prepares(server, tmp_path):
    for split, pairs in grammar.generate(5, {"train": 200, "valid": 10, "test": 10}).items():
        for side, language in enumerate(("de", "en")):
            server.files[f"/{split}.{language}"] = "".join(pair[side] + "\n" for pair in pairs).encode()
    data = {split: [f"{split}.de", f"{split}.en"] for split in ("train", "valid", "test")} | {"urls": [server.url]}
    recipe = write_recipe(tmp_path, data=data)
    options = ("--work-dir", tmp_path / "work", "--download-dir", tmp_path / "downloads")
    done = run("encourage-mt", "prepare", recipe, *options)
    assert "train: 200 pairs" in done.stdout
    again = run("encourage-mt", "prepare", recipe, *options, "--overwrite")
    assert again.stdout.count("reused") == 6 and len(server.requests) == 6
    assert prepare(load_recipe(recipe), tmp_path / "work").is_dir()
