import io
import subprocess
import tarfile

import pytest

from edgeprune.device import ortweb
from edgeprune.errors import DeviceError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def package(path, monkeypatch):
    """A package of the right names; its hash is taken for the published one."""
    with tarfile.open(path, "w:gz") as tar:
        for name in (name for names in ortweb.FILES.values() for name in names):
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    digest = subprocess.run(
        ["openssl", "dgst", "-sha512", "-binary", str(path)], capture_output=True, check=True
    ).stdout
    import base64

    monkeypatch.setattr(ortweb, "INTEGRITY", "sha512-" + base64.b64encode(digest).decode())


def test_absent_files_name_the_command():
    with pytest.raises(DeviceError, match="edgeprune targets fetch web-wasm"):
        ortweb.files("wasm")


def test_unknown_provider():
    with pytest.raises(DeviceError, match="'webgl'"):
        ortweb.files("webgl")


def test_another_package_is_refused(tmp_path, home):
    other = tmp_path / "x.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(DeviceError, match="sha512 differs"):
        ortweb.fetch(other)
    assert not home.exists()


def test_a_package_at_hand_is_unpacked(tmp_path, home, monkeypatch):
    package(tmp_path / "x.tgz", monkeypatch)
    folder = ortweb.fetch(tmp_path / "x.tgz")
    assert folder.is_relative_to(home)
    assert [path.read_text() for path in ortweb.files("webgpu")] == list(ortweb.FILES["webgpu"])
    assert sorted(p.name for p in folder.iterdir()) == sorted(n for names in ortweb.FILES.values() for n in names)


def test_npm_brings_it(tmp_path, monkeypatch):
    package(tmp_path / "x.tgz", monkeypatch)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {ortweb.PACKAGE}" ] || exit 9\ncp {tmp_path}/x.tgz .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    ortweb.fetch()
    assert ortweb.files("wasm")
    npm.write_text("#!/bin/sh\necho offline >&2\nexit 1\n")
    with pytest.raises(DeviceError, match=r"offline.*--from FILE\.tgz"):
        ortweb.fetch()


def test_without_npm_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=rf"npm is not installed.*npm pack {ortweb.PACKAGE}.*--from"):
        ortweb.fetch()


def test_an_archive_that_is_not_there(tmp_path):
    with pytest.raises(DeviceError, match="No such file"):
        ortweb.fetch(tmp_path / "none.tgz")
