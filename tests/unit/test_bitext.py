"""Read parallel text, and refuse text that is damaged or misaligned."""

import gzip

import pytest

from encourage_mt.data import bitext
from encourage_mt.data.bitext import MAX_LINE, iterate_pairs, iterate_segments, iterate_talks, read_lines
from encourage_mt.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_end_at_newline_only(tmp_path):
    path = write(tmp_path / "a", "\ufeffeins\u2028zwei\r\ndrei\x0bvier\u0085\n\nfünf")
    assert read_lines(path) == ["eins\u2028zwei", "drei\x0bvier\u0085", "", "fünf"]
    assert read_lines(write(tmp_path / "a.gz", gzip.compress(path.read_bytes()))) == read_lines(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("empty", b"", "empty: empty file"),
        ("bytes", b"gut\nna\xff ja\n", "bytes: line 2, byte 3: not UTF-8"),
        ("utf16", "gut\n".encode("utf-16"), "utf16: line 1, byte 1: not UTF-8"),
        ("page.gz", b"<html>not found</html>", "page.gz: Not a gzipped file"),
        ("cut.gz", gzip.compress(b"eins\nzwei\n")[:-9], "cut.gz: Compressed file ended"),
        ("long", b"eins\n" + b"x" * (MAX_LINE + 1), f"long: line 2: longer than {MAX_LINE:,} bytes"),
        ("bomb.gz", gzip.compress(b"\n" * 2000), "bomb.gz: expands to more than 1,000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_file_that_is_not_text_is_refused(name, content, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(bitext, "size_limit", lambda path: 1000 if path.stem == "bomb" else 1 << 30)
    with pytest.raises(UserError, match=expected):
        read_lines(write(tmp_path / name, content))
    with pytest.raises(UserError, match="absent: No such file"):
        read_lines(tmp_path / "absent")


def test_line_of_a_million_characters_is_read(tmp_path):
    line = "\U0001f600" * 10**6
    assert read_lines(write(tmp_path / "a", f"{line}\n{line}")) == [line, line]


def test_only_line_ends_divide_lines(tmp_path):
    content = b"\xef\xbb\xbf\xc3\xa4 b\r\n\n\r\n\xe2\x80\xa8c\n\n"
    assert read_lines(write(tmp_path / "a", content)) == ["ä b", "", "", "\u2028c", ""]
    with pytest.raises(UserError, match="b: line 6, byte 2: not UTF-8"):
        read_lines(write(tmp_path / "b", content + b"x\xff"))


def test_sides_of_different_length_are_refused_with_the_misaligned_line(tmp_path):
    lines = ["word " * (n * 7 % 11 + 1) for n in range(400)]
    files = [write(tmp_path / "de", "\n".join(lines) + "\n")]
    files.append(write(tmp_path / "en", "\n".join(lines[:250] + lines[252:]) + "\n"))
    with pytest.raises(UserError, match="de has 400 lines, .*en has 398.* line 25[0-2] "):
        list(iterate_pairs(files, [1, 2], []))
    with pytest.raises(UserError, match="en has 398 lines, .*de has 400.* line 25[0-2] "):
        list(iterate_pairs(files[::-1], [1, 2], []))


def test_tab_separated_columns(tmp_path):
    path = write(tmp_path / "a.tsv.gz", gzip.compress(b"one\teins\tTom\ntwo\tzwei\n"))
    assert list(iterate_pairs([path], [2, 1], [])) == [("eins", "one"), ("zwei", "two")]
    with pytest.raises(UserError, match="a.tsv.gz: line 2: has 2 tab-separated columns, needs 3"):
        list(iterate_pairs([path], [1, 3], []))


@pytest.mark.parametrize(
    "line, expected",
    [
        ('<seg id="1"> a &amp; b </seg>', ["a &amp; b"]),
        ('<hl><seg id="1">a</seg> <seg id="2">b</seg></hl>', ["a", "b"]),
        ("<seg id=3>a</seg>", ["a"]),
        ('<seg id="1-2">a</seg>', ["a"]),
        ("<SEG>a < b</SEG >", ["a < b"]),
        ("<segment>a</segment>", []),
        ('<seg id="1">a', None),
        ("a</seg>", None),
        ('<seg id="1">a<seg id="2">b</seg></seg>', None),
    ],
)
def test_segments_are_read_from_single_lines(line, expected, tmp_path):
    path = write(tmp_path / "a.sgm", f'<doc>\n<seg id="0">first</seg>\n{line}\n</doc>\n')
    if expected is not None:
        assert list(iterate_segments(path)) == ["first", *expected]
        return
    with pytest.raises(UserError, match="a.sgm: line 3"):
        list(iterate_segments(path))


def test_file_without_segments_is_refused(tmp_path):
    with pytest.raises(UserError, match="b.sgm"):
        list(iterate_segments(write(tmp_path / "b.sgm", "<doc></doc>\n")))


def test_tags_of_talks_are_dropped_as_they_are_written(tmp_path):
    text = "<url>x</url>\n<title>A</title>\n b \n<c.>x</c.>\n<cd>y</cd>\n"
    path = write(tmp_path / "train.tags.de-en.de", text)
    assert list(iterate_talks(path, ["url", "c."])) == ["A", "b", "<cd>y</cd>"]
    assert len(list(iterate_talks(path, []))) == 5
