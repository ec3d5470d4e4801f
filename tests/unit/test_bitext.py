"""Reading parallel text, and what is refused."""

import gzip

import pytest

from encourage_mt.data.bitext import iterate_pairs, iterate_segments, read_lines
from encourage_mt.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_end_at_newline_alone(tmp_path):
    path = write(tmp_path / "a", "\ufeffeins\u2028zwei\r\ndrei\x0bvier\u0085\n\nfünf")
    assert read_lines(path) == ["eins\u2028zwei", "drei\x0bvier\u0085", "", "fünf"]
    assert read_lines(write(tmp_path / "a.gz", gzip.compress(path.read_bytes()))) == read_lines(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("empty", b"", "empty: empty file"),
        ("bytes", b"gut\nna\xff ja\n", "bytes: line 2, byte 3: not UTF-8"),
        ("page.gz", b"<html>not found</html>", "page.gz: Not a gzipped file"),
        ("cut.gz", gzip.compress(b"eins\nzwei\n")[:-9], "cut.gz: Compressed file ended"),
    ],
)
def test_files_that_are_no_text_are_named(name, content, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        read_lines(write(tmp_path / name, content))
    with pytest.raises(UserError, match="No such file"):
        read_lines(tmp_path / "absent")


def test_sides_of_different_length_are_refused_with_the_line_where_they_drift_apart(tmp_path):
    lines = ["word " * (n * 7 % 11 + 1) for n in range(400)]
    files = [write(tmp_path / "de", "\n".join(lines) + "\n")]
    files.append(write(tmp_path / "en", "\n".join(lines[:250] + lines[252:]) + "\n"))
    with pytest.raises(UserError, match="de has 400 lines, .*en has 398.* drift apart at about line 25[0-2]$"):
        list(iterate_pairs(files, [1, 2], []))
    with pytest.raises(UserError, match="en has 398 lines, .*de has 400.* at about line 25[0-2]$"):
        list(iterate_pairs(files[::-1], [1, 2], []))


def test_tab_separated_columns(tmp_path):
    path = write(tmp_path / "a.tsv.gz", gzip.compress(b"one\teins\tTom\ntwo\tzwei\n"))
    assert list(iterate_pairs([path], [2, 1], [])) == [("eins", "one"), ("zwei", "two")]
    with pytest.raises(UserError, match="a.tsv.gz: line 2: 2 of 3 tab-separated columns"):
        list(iterate_pairs([path], [1, 3], []))


def test_segments_of_one_line_alone_are_taken(tmp_path):
    path = write(tmp_path / "a.sgm", '<doc>\n<seg id="1"> a &amp; b </seg>\n<seg id="2">c\n</seg>\n')
    with pytest.raises(UserError, match="a.sgm: line 3: a segment that does not end in its line"):
        list(iterate_segments(path))
    with pytest.raises(UserError, match="no <seg"):
        list(iterate_segments(write(tmp_path / "b.sgm", "<doc></doc>\n")))
