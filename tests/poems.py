"""A domain that English tokenizers fall to bytes on: the Tang and Song poems of Debian's package fortunes-zh, or verses
made here where the package can not be had."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.models import cache_folder

PACKAGE = "fortunes-zh"
BOOKS = ("tang300", "song100")
INSTALLED = Path("/usr/share/games/fortunes")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
PHRASES = ("明月", "春風", "秋水", "長安", "落花", "青山", "故人", "萬里", "白雲", "江南春", "夜雨", "黃河")
CHARACTERS = "不見人來去天地日上下歸心無聲何處是東西"


class NoPackage(RuntimeError):
    """The package is neither installed nor to be had; the message says what was tried."""


def written() -> list[str]:
    """The package's 372 poems with title and author. Raises NoPackage when it is neither installed nor downloaded."""
    for folder in (INSTALLED, _downloaded()):
        if all((folder / book).is_file() for book in BOOKS):
            texts = (COLOURS.sub("", (folder / book).read_text()).split("\n%\n") for book in BOOKS)
            return [text.strip() for part in texts for text in part if text.strip()]
    raise NoPackage(f"Debian's package {PACKAGE} is neither installed nor in {_downloaded()}")


def download() -> None:
    """Fetch the package into the user's cache folder, once, without installing it. Raises NoPackage when it fails."""
    target = _downloaded()
    if target.is_dir() or all((INSTALLED / book).is_file() for book in BOOKS):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}.", dir=target.parent) as folder:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package), f"{folder}/files"], check=True, capture_output=True)
        except FileNotFoundError as error:
            raise NoPackage(f"{error.filename} is not there: only Debian and its like have {PACKAGE}") from error
        except subprocess.CalledProcessError as error:
            raise NoPackage(f"{' '.join(error.cmd)}: {str(error.stderr).strip()}") from error
        shutil.copytree(Path(folder) / "files" / INSTALLED.relative_to("/"), Path(folder) / "fortunes")
        (Path(folder) / "fortunes").rename(target)


def made(count: int = 60, seed: int = 0) -> list[str]:
    """Verses over a few dozen characters in which some phrases come back, a title in English now and then."""
    draw = random.Random(seed)

    def verse() -> str:
        return "".join(draw.choice(PHRASES if draw.random() < 0.6 else CHARACTERS) for _ in range(4))

    texts = ["，".join(verse() for _ in range(4)) + "。" for _ in range(count)]
    return [f"Poem {index}\n{text}\n" if not index % 5 else text for index, text in enumerate(texts)]


def at_hand() -> list[str]:
    """The package's poems if they are on this machine, else some made here."""
    try:
        return written()
    except NoPackage:
        return made(300)


def _downloaded() -> Path:
    return cache_folder() / PACKAGE
