import json
import os
import shutil
from pathlib import Path

import pytest

from safeshard.manifests import Finding, Manifest, RequestError, load, verify

FILES = ("model-1.safetensors", "more/model-2.safetensors", "config.json")


def reseal(output: Path, **changes: object) -> None:
    """Replace fields of the manifest, as a forger would who computes its hash anew."""
    (output / "manifest.json").write_text(load(output).model_copy(update=changes).to_json())


def edit(output: Path, old: str, new: str) -> None:
    """Replace text of the manifest and seal it again."""
    text = (output / "manifest.json").read_text()
    assert old in text
    (output / "manifest.json").write_text(Manifest.from_json(text.replace(old, new)).to_json())


def test_an_untouched_output_is_clean(output: Path) -> None:
    done: list[int] = []
    assert verify(output, threads=3, progress=done.append) == []
    assert sum(done) == 24 + 5 + 0 + 4 + (output / "config.json").stat().st_size


def test_report_and_hidden_files_are_not_looked_at(output: Path) -> None:
    (output / "report.html").write_text("x")
    (output / ".gitattributes").write_text("x")
    (output / ".cache").mkdir()
    (output / ".cache" / "x").write_text("x")
    assert verify(output) == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_byte_of_any_file_is_found(output: Path, name: str) -> None:
    content = (output / name).read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (output / name).write_bytes(damaged)
        assert {finding.file for finding in verify(output, threads=1)} == {name}


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_found(output: Path) -> None:
    content = (output / "manifest.json").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (output / "manifest.json").write_bytes(damaged)
        assert "manifest.json" in {finding.file for finding in verify(output, threads=1)}


def test_a_flipped_bit_is_attributed_to_its_tensor(output: Path) -> None:
    file = output / "model-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    (finding,) = verify(output)
    assert (finding.file, finding.tensor, finding.problem) == ("model-1.safetensors", "b.bias", "hash differs")
    expected = next(tensor.blake3 for tensor in load(output).tensors if tensor.name == "b.bias")
    assert str(finding) == f"model-1.safetensors: b.bias: hash differs: expected {expected}, got {finding.got}"


def test_findings_do_not_depend_on_the_threads(output: Path) -> None:
    (output / "config.json").write_bytes(b"x")
    (output / "model-1.safetensors").write_bytes((output / "model-1.safetensors").read_bytes()[:-29] + b"\7" * 29)
    found = verify(output, threads=1)
    assert [f.tensor or f.file for f in found] == ["a.weight", "b.bias", "config.json", "config.json"]
    assert all(verify(output, threads=threads) == found for threads in (2, 7))


def test_an_edited_manifest_is_reported(output: Path) -> None:
    text = (output / "manifest.json").read_text()
    (output / "manifest.json").write_text(text.replace("0.5201", "0.1201"))
    (finding,) = verify(output)
    assert (finding.file, finding.problem) == ("manifest.json", "edited after it was written")
    sealed = json.loads(text)
    del sealed["blake3"]
    (output / "manifest.json").write_text(json.dumps(sealed))
    assert [f.expected for f in verify(output)] == ["a blake3 field"]


def test_missing_and_extra_files(output: Path) -> None:
    (output / "config.json").unlink()
    shutil.rmtree(output / "more")
    (output / "pytorch_model.bin").write_bytes(b"x")
    (output / "sub").mkdir()
    (output / "sub" / "x.py").write_text("x")
    (output / "linked").symlink_to(output.parent, target_is_directory=True)
    extra = "a file that the manifest does not name"
    assert [(f.file, f.problem) for f in verify(output)] == [
        ("more/model-2.safetensors", "missing"),
        ("config.json", "missing"),
        ("linked", extra),
        ("pytorch_model.bin", extra),
        ("sub/x.py", extra),
    ]


def test_missing_extra_and_different_tensors(output: Path) -> None:
    first, second, third, fourth = load(output).tensors
    changed = first.model_copy(update={"shape": (3, 2), "dtype": "I32"})
    missing = second.model_copy(update={"name": "gone"})
    reseal(output, tensors=(changed, missing, third, fourth))
    name = "model-1.safetensors"
    assert verify(output) == [
        Finding(name, "a.weight", "dtype differs", "I32", "F32"),
        Finding(name, "a.weight", "shape differs", "[3, 2]", "[2, 3]"),
        Finding(name, "gone", "missing"),
        Finding(name, "b.bias", "a tensor that the manifest does not name"),
    ]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_truncated_file_is_found(output: Path, name: str, keep: int) -> None:
    (output / name).write_bytes((output / name).read_bytes()[:keep])
    assert {finding.file for finding in verify(output)} == {name}


def test_a_longer_file_is_found(output: Path) -> None:
    with (output / FILES[0]).open("ab") as file:
        file.write(b"x")
    size = (output / FILES[0]).stat().st_size
    assert [(f.problem, f.got) for f in verify(output)] == [
        ("size differs", str(size)),
        ("invalid header", f"{size} (trailing bytes)"),
    ]


@pytest.mark.parametrize("hostile", ["../secret", "more/../../secret", "{root}/secret", "x\\u0000y"])
def test_names_that_lead_outside_are_not_opened(output: Path, hostile: str) -> None:
    secret = output.parent / "secret"
    shutil.copy(output / "config.json", secret)
    name = hostile.format(root=output.parent)
    edit(output, '"config.json"', f'"{name}"')
    findings = verify(output)
    problem = "cannot be read: the name leads outside of the folder"
    assert [f.problem for f in findings if f.file != "config.json"] == [problem]


def test_links_that_lead_outside_are_not_opened(output: Path) -> None:
    shutil.move(output / "config.json", output.parent / "elsewhere.json")
    (output / "config.json").symlink_to(output.parent / "elsewhere.json")
    assert [str(f) for f in verify(output)] == ["config.json: cannot be read: the link leads outside of the folder"]


def test_links_inside_the_folder_are_followed(output: Path) -> None:
    (output / "config.json").rename(output / ".config")
    (output / "config.json").symlink_to(".config")
    assert verify(output) == []


def test_what_is_no_regular_file_is_not_opened(output: Path) -> None:
    (output / "config.json").unlink()
    os.mkfifo(output / "config.json")
    assert [f.problem for f in verify(output)] == ["cannot be read: not a regular file"]
    (output / "config.json").unlink()
    (output / "config.json").symlink_to("config.json")
    (finding,) = verify(output)
    assert finding.problem.startswith("cannot be read: ")


def test_a_folder_without_manifest_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a manifest"):
        verify(tmp_path)


def test_findings_are_safe_to_print() -> None:
    assert str(Finding("a\x1b", "b\n", "c\x07", "d\r", "e")) == r"a\x1b: b\n: c\x07: expected d\r, got e"


def test_folders_that_cannot_be_looked_into_are_findings(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (output / "sub" / "closed").mkdir(parents=True)
    real = os.scandir

    def scandir(path: str) -> object:  # root may look into every folder
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert verify(output) == [Finding("sub/closed", "", "cannot be listed: Permission denied")]


@pytest.mark.parametrize("target", ["config.json", "nowhere", "/etc/hostname"])
def test_links_that_the_manifest_does_not_name_are_findings(output: Path, target: str) -> None:
    (output / "more" / "deep").mkdir()
    (output / "more" / "deep" / "model.safetensors").symlink_to(target)
    assert verify(output) == [Finding("more/deep/model.safetensors", "", "a file that the manifest does not name")]


def test_a_pipe_in_place_of_the_manifest_is_not_waited_for(output: Path) -> None:
    (output / "manifest.json").unlink()
    os.mkfifo(output / "manifest.json")
    with pytest.raises(RequestError, match="no regular file"):
        verify(output)
