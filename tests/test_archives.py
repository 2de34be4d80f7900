"""Tar archives: what is unpacked by hand where Python has no filter of its own, and what is refused."""

from __future__ import annotations

import io
import tarfile

import pytest

from dyrate_lib import archives
from dyrate_lib.errors import InputError


def packed(*members: tuple[str, bytes | None, bytes]) -> tarfile.TarFile:
    """(name, contents or None, type)"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, contents, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(contents or b""), "/etc/passwd"
            tar.addfile(member, io.BytesIO(contents or b""))
    buffer.seek(0)
    return tarfile.open(fileobj=buffer)


@pytest.mark.parametrize("how", [archives.unpack, archives.unpack_plain])
def test_files_and_folders_are_unpacked(tmp_path, how):
    big = bytes(range(256)) * 9000
    with packed(("a", None, tarfile.DIRTYPE), ("a/b.json", b"{}", tarfile.REGTYPE), ("c/d", big, tarfile.REGTYPE)) as tar:
        how(tar, tmp_path)
    assert (tmp_path / "a/b.json").read_bytes() == b"{}" and (tmp_path / "c/d").read_bytes() == big


@pytest.mark.parametrize("how", [archives.unpack, archives.unpack_plain])
@pytest.mark.parametrize("name, kind", [("../out", tarfile.REGTYPE), ("in/../../out", tarfile.REGTYPE), ("link", tarfile.SYMTYPE),
                                        ("pipe", tarfile.FIFOTYPE)])  # fmt: skip
def test_what_would_lie_outside_is_refused(tmp_path, how, name, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    with packed((name, b"x" if kind == tarfile.REGTYPE else None, kind)) as tar, pytest.raises((InputError, tarfile.TarError)):
        how(tar, inside)
    assert not (tmp_path / "out").exists() and not list(inside.iterdir())


def test_the_hand_is_taken_where_there_is_no_filter(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with packed(("/abs", b"x", tarfile.REGTYPE)) as tar, pytest.raises(InputError, match="plain file"):
        archives.unpack(tar, tmp_path)
