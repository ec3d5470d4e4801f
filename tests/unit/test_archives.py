"""Extracting members of archives, and archives that are refused."""

import io
import re
import tarfile
import zipfile

import pytest

from encourage_mt.data.archives import extract
from encourage_mt.errors import UserError


def archive(path, *members):
    """A .tgz or .zip of (name, content); content None is a link to /etc/passwd."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members:
                info = zipfile.ZipInfo(name)
                info.external_attr = (0o120777 if content is None else 0o100644) << 16
                file.writestr(info, content or "/etc/passwd")
        return path
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(content)
            file.addfile(info, io.BytesIO((content or "").encode()))
    return path


@pytest.mark.parametrize("kind", ["a.tgz", "a.zip"])
def test_members_are_extracted_and_no_others(kind, tmp_path):
    path = archive(tmp_path / kind, ("./x/b.en", "b\n"), ("x/c.en", "c\n"), ("x/a.en", "a\n"))
    extract(path, ["x/a.en", "x/b.en"], tmp_path / "out")
    assert {p.name: p.read_text() for p in (tmp_path / "out").rglob("*.en")} == {"a.en": "a\n", "b.en": "b\n"}
    with pytest.raises(UserError, match="has no x/d.en"):
        extract(path, ["x/d.en"], tmp_path / "out")


@pytest.mark.parametrize("kind", ["a.tgz", "a.zip"])
@pytest.mark.parametrize(
    "member", [("../evil", "x"), ("x/../../evil", "x"), ("/tmp/evil", "x"), ("x/link", None), ("..\\evil", "x")]
)
def test_archives_that_lead_out_of_themselves_are_refused_whole(kind, member, tmp_path):
    path = archive(tmp_path / kind, ("x/a.en", "a\n"), member)
    with pytest.raises(UserError, match=f"{kind}: refused.*{re.escape(repr(member[0]))}"):
        extract(path, ["x/a.en"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a.tgz", "a.zip"])
def test_half_an_archive_is_told(kind, tmp_path):
    path = archive(tmp_path / kind, ("x/a.en", "".join(map(str, range(99999)))))
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(UserError, match=f"{kind}: not a whole archive"):
        extract(path, ["x/a.en"], tmp_path / "out")
