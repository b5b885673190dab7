"""What the doctor finds: a device that answers, a host that is not named, files that were not fetched."""

import pytest

from edgeprune.device import ortweb
from edgeprune.errors import DeviceError
from edgeprune.pipeline.doctor import doctor


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    (tmp_path / "targets").mkdir()
    return tmp_path


def of(diagnosis, subject):
    return {finding.what: finding for finding in diagnosis.findings if finding.subject == subject}


def looked(name=None, on=None):
    return doctor(name, on=on)


def test_this_machine_answers_and_its_table_is_empty():
    found = of(looked("cpu"), "cpu")
    assert found["answers"].ok
    assert "onnxruntime" in found["answers"].found
    assert found["table"].ok
    assert "edgeprune profile --target cpu" in found["table"].mend


def test_only_what_is_asked_for_is_looked_at():
    assert {f.subject for f in looked("cpu").findings} == {"this machine", "cpu"}
    assert {f.subject for f in looked().findings} >= {"this machine", "cpu", "web-wasm"}


def test_an_ssh_target_without_a_host_says_how_to_name_one(own):
    (own / "targets" / "board.toml").write_text('device = "ssh"\n')
    (finding,) = of(looked("board"), "board").values()
    assert not finding.ok
    assert finding.mend == "edgeprune doctor --target board --on HOST"


def test_a_host_that_refuses_is_told(own):
    (own / "targets" / "board.toml").write_text(
        'device = "ssh"\nhost = "127.0.0.1"\nport = 1\nssh_options = ["ConnectTimeout=2"]\n'
    )
    found = looked("board")
    assert not found.ok
    assert not of(found, "board").popitem()[1].ok


def test_a_wrong_file_is_a_finding_and_ends_nothing(own):
    (own / "targets" / "odd.toml").write_text('devise = "local"\n')
    found = looked()
    assert not of(found, "odd")["target file"].ok
    assert "devise" in of(found, "odd")["target file"].found
    assert of(found, "cpu")["answers"].ok
    assert "odd" in found.text()


def test_a_browser_target_needs_its_runtime(monkeypatch, own):
    found = of(looked("web-wasm"), "web-wasm")["runtime"]
    assert not found.ok
    assert found.mend == "edgeprune targets fetch web-wasm"
    monkeypatch.setattr(ortweb, "files", lambda provider: [])
    assert of(looked("web-wasm"), "web-wasm")["runtime"].ok


def test_an_unknown_target_is_an_error():
    with pytest.raises(DeviceError, match="no target named"):
        looked("nothing")
