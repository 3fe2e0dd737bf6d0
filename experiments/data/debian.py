"""Files of Debian packages, without installing them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT_SECONDS = 600


def unpack(package: str, scratch: Path) -> Path:
    """Download a Debian package and unpack it into an empty directory, which needs no rights.

    Returns:
        The directory, which holds the package's files as / would.
    Raises:
        SystemExit: there is no apt-get here, or it fails or takes more than 10 minutes.
    """

    def run(*command: str) -> None:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)

    apt = ("apt-get", "-q", "-o", "Acquire::http::Timeout=20")
    try:
        try:
            run(*apt, "download", package)
        except subprocess.CalledProcessError:
            if os.geteuid() != 0:
                raise
            run(*apt, "update")  # fresh containers have no package lists, and only root can fetch them
            run(*apt, "download", package)
        for file in scratch.glob("*.deb"):
            run("dpkg-deb", "-x", file.name, ".")
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise SystemExit(
            f"{package}: apt-get download failed ({reason}); connect to the network, or unpack the package elsewhere "
            f"(dpkg-deb -x {package}.deb FOLDER) and give --root FOLDER"
        ) from error
    return scratch
