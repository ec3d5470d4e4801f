"""Extract members of archives, and refuse archives that are hostile, damaged or unsupported in one line."""

import io
import random
import re
import tarfile
import zipfile

import pytest

from encourage_mt.data import archives
from encourage_mt.data.archives import extract
from encourage_mt.errors import UserError

KINDS = ["a.tgz", "a.zip", "a.tar", "a.tar.xz", "a.tar.bz2"]


def archive(path, *members):
    """Write an archive of (name, content); content None is a link to /etc/passwd, b"" a device, True a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members:
                info = zipfile.ZipInfo(f"{name}/" if content is True else name)
                mode = {None: 0o120777, b"": 0o020666, True: 0o040755}.get(content, 0o100644)
                info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
                file.writestr(info, content if isinstance(content, str) else b"")
        return path
    mode = {".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            kinds = {None: tarfile.SYMTYPE, b"": tarfile.CHRTYPE, True: tarfile.DIRTYPE}
            info.type = kinds.get(content, tarfile.REGTYPE)
            info.linkname = "/etc/passwd" if content is None else ""
            info.size = len(content) if isinstance(content, str) else 0
            file.addfile(info, io.BytesIO(content.encode()) if info.size else None)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_members_asked_for_are_extracted(kind, tmp_path):
    members = [(".", True), ("./x", True), ("./x/b.en", "b\n"), ("x/c.en", "c\n"), ("x/a.en", "a\n"), ("x", True)]
    path = archive(tmp_path / kind, *members)
    extract(path, ["x/a.en", "x/b.en"], tmp_path / "out")
    assert {p.name: p.read_text() for p in (tmp_path / "out").rglob("*.en")} == {"a.en": "a\n", "b.en": "b\n"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(
    "members, expected",
    [
        ([("../evil", "x")], "'../evil'"),
        ([("x/../../evil", "x")], "evil'"),
        ([("/tmp/evil", "x")], "'/tmp/evil'"),
        ([("/tmp/evil", True)], "'/tmp/evil/?'"),
        ([("..\\evil", "x")], re.escape(r"'..\\evil'")),
        ([("x/li\nnk", None)], re.escape(r"'x/li\nnk'")),
        ([("x/null", b"")], "'x/null'"),
        ([("x/a.en", "other")], "has x/a.en twice"),
        ([("./x//a.en", "other")], "has x/a.en twice"),
        ([(f"x/{n}", "") for n in range(50)], "more than 40 members"),
    ],
)
def test_hostile_archive_is_refused_as_a_whole(kind, members, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 40)
    path = archive(tmp_path / kind, ("x/a.en", "a\n"), *members)
    with pytest.raises(UserError, match=f"{kind}: .*{expected}"):
        extract(path, ["x/a.en"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("member, expected", [("x/d.en", "no x/d.en"), ("x", "x is a folder")])
def test_member_that_is_missing_or_a_folder_is_named(kind, member, expected, tmp_path):
    path = archive(tmp_path / kind, ("x", True), ("x/a.en", "a\n"))
    with pytest.raises(UserError, match=f"{kind}: .*{expected}"):
        extract(path, [member], tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_member_that_expands_beyond_the_limit_is_refused(kind, tmp_path, monkeypatch):
    path = archive(tmp_path / kind, ("x/a.en", "0" * 2_000_000))
    monkeypatch.setattr(archives, "MIN_LIMIT", 1_000_000)
    monkeypatch.setattr(archives, "MAX_RATIO", 0)
    with pytest.raises(UserError, match=f"{kind}: .*1,000,000 bytes"):
        extract(path, ["x/a.en"], tmp_path / "out")
    assert (tmp_path / "out" / "x" / "a.en").stat().st_size <= 1_000_000


def test_oversized_header_of_a_tar_is_not_read(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf())
    with pytest.raises(UserError, match="a.tar: .*header"):
        extract(tmp_path / "a.tar", ["x"], tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"BZh9"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_file_that_is_not_an_archive_is_refused(kind, content, tmp_path):
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(UserError, match=f"{kind}: damaged archive"):
        extract(tmp_path / kind, ["x/a.en"], tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_half_an_archive_is_refused(kind, tmp_path):
    text = "".join(map(str, random.Random(1).choices(range(10**9), k=9999)))
    path = archive(tmp_path / kind, ("x/a.en", text))
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(UserError, match=f"{kind}: damaged archive"):
        extract(path, ["x/a.en"], tmp_path / "out")


@pytest.mark.parametrize("at, value", [(6, 1), (8, 99)], ids=["encrypted", "unknown method"])
def test_zip_that_python_cannot_read_is_refused(at, value, tmp_path):
    path = archive(tmp_path / "a.zip", ("x/a.en", "a\n"))
    content = bytearray(path.read_bytes())
    content[at] = value  # in the member's header, and in the central directory, where it is two bytes later
    content[content.index(b"PK\x01\x02") + at + 2] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.zip: cannot be read .*--raw-dir"):
        extract(path, ["x/a.en"], tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_archive_is_extracted_or_refused_in_one_line(kind, tmp_path):
    path = archive(tmp_path / kind, ("x/a.en", "Ein Satz.\n" * 50), ("x/b.en", "b\n"))
    good, rng = path.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(100):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            extract(path, ["x/a.en"], tmp_path / "out")
        except UserError as error:
            refused += 1
            assert kind in str(error) and str(error).isprintable()
    assert refused > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_never_gives_another_text(kind, tmp_path):
    if kind.endswith(".tar"):
        pytest.skip("an uncompressed .tar has no checksum of its members")
    text, rng = "".join(map(str, random.Random(1).choices(range(10**9), k=999))), random.Random(2)
    path = archive(tmp_path / kind, ("x/a.en", text), ("x/b.en", text))
    good, refused = path.read_bytes(), 0
    for _ in range(40):
        content = bytearray(good)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            extract(path, ["x/a.en"], tmp_path / "out")
            assert (tmp_path / "out" / "x" / "a.en").read_text() == text
        except UserError:
            refused += 1
    assert refused > 10
