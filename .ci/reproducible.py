"""The build backend: setuptools', whose archives depend on nothing but the files in them and SOURCE_DATE_EPOCH.

setuptools writes times, owners and modes of the working tree and of the moment into an sdist, and modes into a wheel.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

EPOCH = 315532800  # 1980, where zip archives begin


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    name = build_meta.build_sdist(sdist_directory, config_settings)
    normalize(Path(sdist_directory) / name)
    return name


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    before = os.umask(0o022)
    try:
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    finally:
        os.umask(before)


def normalize(archive: Path) -> None:
    """Rewrite a .tar.gz: members by name, one time, no owner, modes 644 and 755."""
    when = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))
    written = io.BytesIO()
    with (
        tarfile.open(archive) as before,
        gzip.GzipFile("", "wb", 9, written, mtime=when) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.linkname, plain.mtime = member.type, member.size, member.linkname, when
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            after.addfile(plain, before.extractfile(member) if member.isreg() else None)
    archive.write_bytes(written.getvalue())
