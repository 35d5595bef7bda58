"""A change in any of the extension's crates installs the project again: by dev/setup.sh, and by uv."""

import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


CRATES = ["bpe", "kernels", "python"]


def extension_sources():
    """The files that the extension is compiled from, relative to the repository."""
    crates = [ROOT / "rustbpe" / crate for crate in CRATES]
    files = [ROOT / "rustbpe" / "Cargo.toml", *(crate / "Cargo.toml" for crate in crates)]
    for crate in crates:
        files += sorted((crate / "src").rglob("*.rs"))
    return [file.relative_to(ROOT) for file in files]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what dev/setup.sh looks at."""
    for file in [Path("pyproject.toml"), Path("dev/constraints.txt"), Path("dev/setup.sh"), *extension_sources()]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def sources_hash(checkout):
    command = ["bash", "-c", ". dev/setup.sh; sources_hash"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_setup_notices_a_change_in_any_crate(checkout):
    files = extension_sources()
    assert {file.parts[1] for file in files} == {"Cargo.toml", *CRATES}
    hashes = {sources_hash(checkout)}
    assert hashes == {sources_hash(checkout)}
    for crate in CRATES:
        for file in ("Cargo.toml", "src/lib.rs", "src/new/module.rs"):
            path = checkout / "rustbpe" / crate / file
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8") as f:
                f.write("# changed\n")
            hashes.add(sources_hash(checkout))
    assert len(hashes) == 3 * len(CRATES) + 1


def test_environment_of_another_checkout_is_not_replaced(checkout):
    (checkout / "other" / "bin").mkdir(parents=True)
    (checkout / "other" / "bin" / "python").symlink_to("/bin/true")
    (checkout / "other" / "installed-").write_text("another hash")
    (checkout / ".venv").symlink_to("other")
    done = subprocess.run(["bash", "-c", ". dev/setup.sh; set_up"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 2 and ".venv is a link" in done.stderr


def test_uv_notices_a_change_in_any_crate():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = [key["file"] for key in config["tool"]["uv"]["cache-keys"]]
    matched = {file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern)}
    assert {*extension_sources(), Path("pyproject.toml")} <= matched
    assert any(fnmatchcase("rustbpe/kernels/src/new/module.rs", pattern.replace("**/", "*")) for pattern in patterns)


def test_every_member_of_the_workspace_is_covered():
    manifest = tomllib.loads((ROOT / "rustbpe" / "Cargo.toml").read_text(encoding="utf-8"))
    assert manifest["workspace"]["members"] == CRATES
