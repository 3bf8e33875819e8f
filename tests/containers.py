"""Images that are really built and started where no Docker engine runs: podman, with chroot isolation for the build.

The base is made of Debian's packages and of the Python that runs the tests; `GRASP_CUBE_BASE` names an image to pull
instead. Package sources, certificates and uv's cache are this machine's: they are lent to the build, never copied.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import ROOT, Running, running

__all__ = ["Engine", "missing_tools"]

# What Python's standard library links to, by Debian's names.
LIBRARIES = (
    "ca-certificates,libbz2-1.0,libexpat1,libffi8,liblzma5,libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g"
)
# Parts of an installed Python that no image needs; the packages of this machine are not its business either.
LEFT_OUT = ("site-packages", "test", "idlelib", "tkinter", "__pycache__", "config-3.*")
# Some machines may not raise limits, or have a layout of control groups that only the older runtime knows.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")
WAYS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((), ()),
    ((), LIMITS),
    (("--runtime", "runc"), ()),
    (("--runtime", "runc"), LIMITS),
)


def missing_tools() -> str | None:
    """Why nothing can be built here."""
    wanted = ["podman"] if "GRASP_CUBE_BASE" in os.environ else ["podman", "debootstrap"]
    missing = [name for name in wanted if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install podman runc debootstrap)"
    if os.geteuid() != 0:
        return "root makes the base image"
    if sys.base_prefix == "/usr":
        return "the system's own Python cannot be copied into an image (uv's or pyenv's can)"
    return None


class Engine:
    """podman with a storage of its own in `folder`, removed by `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "tmp").mkdir(parents=True)
        self._podman = ["podman", "--root", folder / "storage", "--runroot", folder / "run"]
        self._podman += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        self._environment = os.environ | {"TMPDIR": str(folder / "tmp")}
        self.base = os.environ.get("GRASP_CUBE_BASE") or self._make_base()
        self._runtime, self._limits = self._way()

    def _run(self, command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(part) for part in command],
            **{"capture_output": True, "text": True, "env": self._environment} | options,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def podman(self, *arguments: Any) -> str:
        """What a podman command prints; an assertion error when it fails."""
        return self._run([*self._podman, *arguments]).stdout.strip()

    def _make_base(self) -> str:
        root = self.folder / "base"
        self._run(["debootstrap", "--variant=minbase", f"--include={LIBRARIES}", "bookworm", root])
        local, python = root / "usr" / "local", f"python{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copytree(
            Path(sys.base_prefix) / "lib",
            local / "lib",
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*LEFT_OUT),
        )
        (local / "lib" / python / "site-packages").mkdir()
        shutil.copy2(Path(sys.base_prefix) / "bin" / python, local / "bin")
        (local / "bin" / "python3").symlink_to(python)
        self._run(["chroot", root, "ldconfig"])
        for folder in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / folder)
        archive = self.folder / "base.tar"
        self._run(["tar", "-C", root, "-cf", archive, "."])
        shutil.rmtree(root)
        self.podman("import", "--quiet", archive, "localhost/base")
        archive.unlink()
        return "localhost/base"

    def _way(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """How containers run on this machine."""
        why = []
        for runtime, limits in WAYS:
            command = [
                *self._podman,
                *runtime,
                "run",
                "--rm",
                "--network",
                "host",
                *limits,
                self.base,
                "true",
            ]
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, env=self._environment
            )
            if done.returncode == 0:
                return runtime, limits
            why.append(done.stderr.strip())
        raise AssertionError("no container runs here:\n" + "\n".join(why))

    def build(self, recipe: str, tag: str, **arguments: str) -> float:
        """Build an image from the repository's root; its size in bytes."""
        settings = ["native-tls = true"]
        command: list[Any] = [*self._podman, "build", "--isolation", "chroot", "--format", "docker"]
        lent = ["/etc/ssl/certs", "/etc/pip.conf"]
        if shutil.which("uv"):
            uv = self._run(["uv", "--version"]).stdout.split()[1]
            cache = self._run(["uv", "cache", "dir"]).stdout.strip()
            settings.append('cache-dir = "/uv-cache"')
            command += ["--build-arg", f"UV=uv=={uv}", "--volume", f"{cache}:/uv-cache"]
        (self.folder / "uv.toml").write_text("\n".join(settings) + "\n")
        command += ["--volume", f"{self.folder / 'uv.toml'}:/etc/uv/uv.toml:ro"]
        for path in filter(os.path.exists, lent):
            command += ["--volume", f"{path}:{path}:ro"]
        for name, value in ({"BASE": self.base} | arguments).items():
            command += ["--build-arg", f"{name}={value}"]
        self._run([*command, "--file", recipe, "--tag", tag, "."], cwd=ROOT)
        return self.config(tag)["Size"]

    def config(self, tag: str) -> dict[str, Any]:
        """What `podman image inspect` tells."""
        return json.loads(self.podman("image", "inspect", tag))[0]

    def command(self, tag: str, *arguments: Any, options: Sequence[Any] = (), **variables: str) -> list[str]:
        """The command line that runs an image, on the machine's own network."""
        command = [*self._podman, *self._runtime, "run", "--rm", "--network", "host", *self._limits, *options]
        for name, value in variables.items():
            command += ["--env", f"{name}={value}"]
        return [str(part) for part in (*command, tag, *arguments)]

    @contextlib.contextmanager
    def container(self, tag: str, **variables: str) -> Iterator[tuple[Running, str]]:
        """A running container of that image, with its name."""
        name = f"{tag}-{time.monotonic_ns()}"
        with running(*self.command(tag, options=("--name", name), **variables)) as process:
            try:
                yield process, name
            finally:
                subprocess.run([*map(str, self._podman), "rm", "--force", name], capture_output=True)

    def close(self) -> None:
        for what in (("rm", "--all", "--force"), ("rmi", "--all", "--force")):
            subprocess.run([*map(str, self._podman), *what], capture_output=True, env=self._environment)
        # The storage mounts itself.
        subprocess.run(["umount", self.folder / "storage" / "overlay"], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)
