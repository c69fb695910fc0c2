"""What goes to a package index: the wheel holds the package whole and nothing else, the sdist what tests need."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import hf_sparse24

pytest.importorskip("hatchling", reason="hatchling is not installed")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_sparse24"
OF_THE_PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in PACKAGE.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_is_the_package(dist):
    (path,) = dist.glob("*.whl")
    assert path.name == f"hf_sparse24-{hf_sparse24.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        information = f"hf_sparse24-{hf_sparse24.__version__}.dist-info"
        metadata = HeaderParser().parsestr(wheel.read(f"{information}/METADATA").decode())
        scripts = wheel.read(f"{information}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(information)} == OF_THE_PACKAGE
    # what is read at run time beside the modules
    assert {path.suffix for path in map(Path, OF_THE_PACKAGE)} == {".py", ".cu", ".h", ".md", ".typed"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"gpu", "eval", "demo", "bench"} <= set(metadata.get_all("Provides-Extra"))
    assert "hf-sparse24 = hf_sparse24.cli:main" in scripts


def test_the_sdist_has_what_tests_and_docs_need(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    left_out = set(tracked.stdout.split()) - names
    assert {name.partition("/")[0] for name in left_out} <= {".ci", ".gitignore", ".pre-commit-config.yaml"}
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", ".demo", ".models"))]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_syntax_is_that_of_the_oldest_python(path):
    ast.parse(path.read_text("utf8"), feature_version=(3, 10))
