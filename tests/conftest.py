"""Fixtures: base directories, a small pocket corpus and tokenizer made once per session, and running scripts."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

# More threads slow such small models down, up to 100 times on a busy machine. Must be set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from helpers import CPU, MIRROR, random_model, run_python  # noqa: E402


@pytest.fixture(scope="session")
def pocket_base(tmp_path_factory):
    """Path of a base directory with base_data/ (200,000 characters) and tokenizer/ (600 tokens). Read-only."""
    from nanochat import dataset
    from scripts import tok_train

    base = tmp_path_factory.mktemp("pocket_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        dataset.main(["--pocket", "--chars=200000"])
        tok_train.main(["--vocab_size=600"])
    return base


@pytest.fixture
def base(pocket_base, tmp_path, monkeypatch):
    """A new base directory that links to the corpus and tokenizer of pocket_base; also the working directory."""
    for name in ("base_data", "tokenizer"):
        (tmp_path / name).symlink_to(pocket_base / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def empty_base(tmp_path, monkeypatch):
    """A base directory without files, tmp_path/base. The working directory is tmp_path."""
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(tmp_path)
    return base


@pytest.fixture
def sft_checkpoint(base):
    """`base` with step 3 of a tiny random sft model, d1, whose metadata names the pocket corpus."""
    from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
    from nanochat.tokenizer import get_tokenizer

    # "data" is what "corpus" was called before version 0.3.
    model = random_model(600, sequence_len=128, n_layer=1)
    meta = {"data": "pocket", "user_config": {}, "made_from": {"tokenizer": get_tokenizer().fingerprint()}}
    save_checkpoint(checkpoint_dir("sft", "d1"), 3, model, [], meta, CPU)
    return base


@pytest.fixture
def mirror(monkeypatch):
    """Makes the local mirror the host of all public data sets."""
    for host, folder in (("HUB", MIRROR), ("GITHUB", MIRROR), ("BUCKET", MIRROR / "karpathy-public")):
        monkeypatch.setenv(f"NANOCHAT_{host}_URL", str(folder))


@pytest.fixture
def run_script(base):
    """run_script("scripts.base_train", "--depth=2", ranks=2) runs a script in new processes -> CompletedProcess."""

    def run_script(module, *flags, ranks=1, check=True):
        return run_python("-m", module, *flags, ranks=ranks, check=check)

    return run_script


@pytest.fixture
def run_main_in():
    """As run_main, in a base directory that another fixture has chosen."""

    def run_main(module, *flags):
        importlib.import_module(module).main(list(map(str, flags)))

    return run_main


@pytest.fixture
def run_main(base, run_main_in):
    """run_main("scripts.base_train", "--depth=2") calls the script's main() in this process, which is faster."""
    return run_main_in


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (uv pip install playwright)")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(address, **options): a page; fails on script errors, blocked content and requests to elsewhere."""
    contexts, problems = [], []

    def open_page(address, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
        page.on("request", lambda request: request.url.startswith((address, "data:")) or problems.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, cached in the home directory."""
    folder = Path.home() / ".cache" / "nanochat-tests"
    path = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core"]
            subprocess.run(install, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            pytest.skip("needs axe-core, and npm cannot get it")
    return path.read_text(encoding="utf-8")
