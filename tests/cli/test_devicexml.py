"""`millpond device xml`: what libvirt's own schema says of it, and what is in it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdclient
from controlserver import PlayedCache, id_of
from millpond.cli.hook import volume_of
from millpond.cli.main import main
from millpond.cli.run import NOT_FOUND, UNREACHABLE, USAGE
from millpondprocess import Millpond

SCHEMAS = Path("/usr/share/libvirt/schemas")
# libvirt 11.3 and newer; the schema of Debian 12 is older than the element.
RECONNECT = """
        <optional>
          <element name="reconnect">
            <attribute name="delay"><ref name="unsignedInt"/></attribute>
          </element>
        </optional>
"""
DOMAIN = """<domain type='kvm'>
  <name>web</name>
  <memory unit='MiB'>512</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
{disk}
  </devices>
</domain>
"""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PlayedCache]:
    with PlayedCache(tmp_path / "control") as made:
        made.volumes = {"web1", "<a&b> '\"", "ünï"}
        yield made


def xml(cache: PlayedCache, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["device", "xml", *arguments, "--control", str(cache.path)]) == 0
    return capsys.readouterr().out


def valid(disk: str, directory: Path) -> bool:
    """Inside a domain, by virt-xml-validate."""
    path = directory / "domain.xml"
    path.write_text(DOMAIN.format(disk=disk))
    done = subprocess.run(
        ["virt-xml-validate", str(path), "domain"], capture_output=True, text=True, timeout=60
    )
    assert "validate" in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode == 0


def newer_schema(directory: Path) -> Path:
    """This machine's schema, which learns of reconnect when it does not know it."""
    copy = directory / "schemas"
    shutil.copytree(SCHEMAS, copy)
    common = copy / "domaincommon.rng"
    text = common.read_text()
    start = text.index('name="diskSourceNetworkProtocolNBD"')
    if 'name="reconnect"' not in text[start : text.index("</define>", start)]:
        place = text.index('<ref name="diskSourceNetworkHost"/>', start)
        common.write_text(text[:place] + RECONNECT + text[place:])
    return copy


@pytest.mark.parametrize("more", [[], ["--read-only"], ["--target", "sdc"]])
def test_block_device_is_valid(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str]
) -> None:
    text = xml(cache, capsys, "web1", *more)
    assert valid(text, tmp_path)
    assert not valid(text.replace("unmap", "umnap"), tmp_path), "that it is valid means something"


def test_names_that_a_path_or_xml_has_to_escape_are_valid(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("<a&b> '\"", "ünï"):
        text = xml(cache, capsys, name)
        assert valid(text, tmp_path)
        source = ElementTree.fromstring(text).find("source")
        assert source is not None
        link = source.get("dev", "").removeprefix("/dev/millpond/")
        assert "/" not in link and volume_of(link) == name


def test_what_guests_rely_on_is_in_it(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = ElementTree.fromstring(xml(cache, capsys, "web1", "--target", "vdx"))
    driver, target = disk.find("driver"), disk.find("target")
    assert driver is not None and driver.attrib == {
        **{"name": "qemu", "type": "raw", "cache": "none", "io": "native"},
        **{"discard": "unmap", "detect_zeroes": "unmap"},
    }
    assert target is not None and target.attrib == {"dev": "vdx", "bus": "virtio"}
    assert disk.findtext("serial") == id_of("web1")[:20]
    assert disk.find("readonly") is None


def test_nbd_is_valid_where_libvirt_knows_reconnect(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = xml(cache, capsys, "web1", "--mode", "nbd", "--reconnect-delay", "30s")
    assert '<reconnect delay="30" />' in text and "io=" not in text
    path = tmp_path / "domain.xml"
    path.write_text(DOMAIN.format(disk=text))
    schema = newer_schema(tmp_path) / "domain.rng"
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", str(schema), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_nbd_without_reconnect_is_valid_everywhere(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = xml(cache, capsys, "web1", "--mode", "nbd", "--reconnect-delay", "0s")
    assert valid(text, tmp_path)
    assert re.search(r'<host transport="unix" socket="/run/millpond/nbd.sock" />', text)


def test_nbd_warns_of_older_libvirt(cache: PlayedCache, capsys: pytest.CaptureFixture[str]) -> None:
    main(["device", "xml", "web1", "--mode", "nbd", "--control", str(cache.path)])
    assert "libvirt before 11.3 ignores <reconnect>" in capsys.readouterr().err


def test_what_cannot_be_shown(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    control = ["--control", str(cache.path)]
    assert main(["device", "xml", "gone", *control]) == NOT_FOUND
    assert main(["device", "xml", "web1", "--mode", "scsi", *control]) == USAGE
    assert main(["device", "xml", "web1", "--target", "../x", *control]) == USAGE
    assert main(["device", "xml", "web1", "--control", str(tmp_path / "none")]) == UNREACHABLE
    assert capsys.readouterr().err.count("\n") == 4


def test_real_cache_knows_the_id_of_a_volume_in_use_and_its_store_of_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "millpond"
    control = ["--control", str(place / "control.sock")]
    with Millpond(place, size_bytes=64 << 20, cache_bytes=256 << 20) as millpond:
        assert main(["volume", "create", "other", "1GiB", "--dir", str(place)]) == 0
        assert main(["volume", "list", "--json", "--dir", str(place)]) == 0
        ids = {each["name"]: each["id"] for each in json.loads(capsys.readouterr().out)}
        with nbdclient.connect(millpond.uri.replace("///", "///disk")):
            for name in ("disk", "other"):
                assert main(["device", "xml", name, *control]) == 0
                disk = ElementTree.fromstring(capsys.readouterr().out)
                assert disk.findtext("serial") == ids[name][:20]
        assert main(["device", "xml", "none", *control]) == NOT_FOUND
