"""A document followed as its reader does: its files are written, its commands are run, in its order.

A code block behind a line that holds only a file's name (`name`:) is that file; each line of an `sh` block is a command.
Two things differ from what is printed: the port 8000 is a free one, and a package is installed without its
dependencies, which lie on a path of their own (torch and LeRobot, 5 GB).
"""

import contextlib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from processes import ROOT, Running, running

__all__ = ["Document", "Place", "from_wheels", "from_workspace", "read_document"]

UV = os.environ.get("UV") or shutil.which("uv") or "uv"
_BLOCK = re.compile(r"(?:^`([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Document:
    """What a document asks its reader to do."""

    # {path in the package's folder: text}
    files: dict[str, str]
    # Command lines, in order.
    commands: list[str]


def read_document(name: str) -> Document:
    """The files and commands of docs/NAME."""
    files: dict[str, str] = {}
    commands: list[str] = []
    for path, language, text in _BLOCK.findall((ROOT / "docs" / name).read_text(encoding="utf-8")):
        if path:
            files[path] = text
        elif language == "sh":
            commands += text.splitlines()
    return Document(files, commands)


@dataclass(frozen=True)
class Place:
    """Where a reader works: a folder, and an installation of this project."""

    folder: Path
    # Where the installation's commands are.
    commands: Path
    env: dict[str, str]
    # What is added to `uv pip install`.
    install: list[str] = field(default_factory=list)

    def write(self, files: dict[str, str]) -> None:
        """The document's files."""
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def run(self, command: str) -> str:
        """What a command prints; an assertion error with it when the command fails."""
        words = self._words(command)
        cwd = ROOT if words[0] == UV else self.folder
        done = subprocess.run(
            words, cwd=cwd, env=os.environ | self.env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def start(self, command: str) -> Iterator[Running]:
        """A command that runs until the block is left."""
        with running(*self._words(command), cwd=self.folder, env=self.env) as child:
            yield child

    def _words(self, command: str) -> list[str]:
        words = shlex.split(command)
        if words[0] == "uv":
            extra = self.install if words[1:3] == ["pip", "install"] else ["--quiet"]
            # Begun where this test was begun: a uv of pyenv's is another one, or none, in another folder.
            return [UV, "--directory", str(self.folder), *words[1:], *extra]
        # The command of this place, not one of the same name that comes first on the caller's PATH.
        assert (self.commands / words[0]).exists(), f"{words[0]} is not installed in {self.commands}"
        return [str(self.commands / words[0]), *words[1:]]


def from_workspace(folder: Path) -> Place:
    """The running environment, with this checkout's packages; what the document builds is put before them."""
    packages = folder / "installed"
    install = ["--quiet", "--no-deps", "--target", str(packages)]
    return Place(_made(folder / "work"), Path(sys.executable).parent, {"PYTHONPATH": str(packages)}, install)


def from_wheels(folder: Path, *projects: str) -> Place:
    """A new environment with the wheels of `projects` (folders of this repository, all built anew).

    What they depend on is taken from the running environment, by a path behind the new one's own: the editable
    installs there are .pth files, which count only in an environment's own folder.
    """
    wheels, venv = _made(folder / "wheels"), folder / "venv"
    for project in projects:
        command = [UV, "build", "--quiet", "--wheel", "--out-dir", str(wheels), str(ROOT / project)]
        subprocess.run(command, check=True, timeout=200)
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True, timeout=100)
    own = next((venv / "lib").glob("python3*")) / "site-packages"
    (own / "third_party.pth").write_text("\n".join(map(str, _third_party())) + "\n")
    install = ["--quiet", "--no-deps", "--python", str(venv)]
    found = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    subprocess.run([UV, "pip", "install", *install, *found], check=True, timeout=200)
    place = Place(_made(folder / "work"), venv / "bin", {"PYTHONPATH": ""}, install)
    modules = ("env_client", "grasp_cube", "numpy_policy")
    seen = place.run(
        f'python -c "import importlib; print(*(importlib.import_module(m).__file__ for m in {modules}))"'
    ).split()
    # A test of the wheels that reads the source tree shows nothing.
    assert [Path(path).is_relative_to(venv) for path in seen] == [True] * len(modules), seen
    return place


def _third_party() -> Iterator[Path]:
    """Where the running environment's packages lie, without the sources that it is linked to."""
    for folder in map(Path, site.getsitepackages()):
        yield folder
        for line in (line for file in folder.glob("*.pth") for line in file.read_text().splitlines()):
            if not Path(line).is_absolute() and (folder / line).is_dir():
                yield folder / line


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
