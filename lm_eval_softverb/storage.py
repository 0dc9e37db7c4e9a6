"""The only writer: atomic files, JSONL, hashes, and the gate every untrusted file passes on its way in."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.errors import ArtifactError, DataError, NonFiniteError, OutputError

if TYPE_CHECKING:
    import torch

MAX_JSON_BYTES = 1 << 20
_UMASK = os.umask(0)
os.umask(_UMASK)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def seed_from(*parts: Any) -> int:
    """A seed for a random stream of its own: the same parts (JSON values) give the same one, on every machine."""
    return int(sha256_json(list(parts))[:15], 16)


# --- writing ---------------------------------------------------------------------------------------------------------


def require_writable(folder: Path) -> None:
    """Creates ``folder`` and proves a file can be written there. Called before any model is loaded.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".softverb-", suffix=".probe"):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to the output folder {folder}: {error.strerror or error}. "
            "Choose another folder or change its permissions."
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` atomically: temporary file in the same folder, fsync, rename.

    Raises:
        OutputError: the disk is full or the folder not writable; the old file is intact and no temporary file is left.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), 0o666 & ~_UMASK)  # mkstemp makes private files; ours are shared like any other
        os.replace(temporary, path)  # noqa: PTH105  (the one call a full disk is injected into)
        temporary = None
    except OSError as error:
        raise OutputError(
            f"Could not write {len(data):,} bytes to {path}: {error.strerror or error}. "
            "The previous file, if any, is unchanged; free some space or choose another folder and run again."
        ) from error
    finally:  # also when a signal ends the write
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save

    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(contiguous, dict(metadata) if metadata else None))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parses one small UTF-8 JSON file from an untrusted folder.

    Raises:
        ArtifactError: missing, larger than ``max_bytes``, not UTF-8, or not JSON.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} is missing. Expected a folder written by `softverb train` or by PEFT.") from error
    if size > max_bytes:
        raise ArtifactError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read from such a file.")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text (byte {error.start}). Write it again as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise ArtifactError(f"{path} is not valid JSON: {error}. The file may be truncated.") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, object)``; blank lines are skipped, a byte-order mark is accepted.

    Raises:
        DataError: with ``file:line`` for text that is not UTF-8, not JSON, or not an object.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line).") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}). The line may be truncated.") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected one JSON object per line, got {type(value).__name__}.")
        yield number, value


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, row)`` of a UTF-8 CSV file with a header; a byte-order mark is accepted.

    Raises:
        DataError: with ``file:line`` for text that is not UTF-8, not CSV, or has another number of fields than the header.
    """
    try:
        text = (raw := path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text (byte {error.start} of the file). Save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for fields in filter(None, reader):
            if len(fields) != len(header):
                raise DataError(f"{path}:{reader.line_num}: {len(fields)} fields, expected {len(header)}: {header}.")
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}). The file may be truncated.") from error


def read_embeddings(path: Path, key: str = "prompt_embeddings") -> torch.Tensor:
    """Reads the rows [n, d] named ``key`` from a safetensors file, checking before copying.

    Returns:
        Contiguous float32 tensor [n, d].

    Raises:
        ArtifactError: unreadable, truncated, wrong key, dtype or rank, or no tokens.
        NonFiniteError: NaN or infinity inside.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            names = list(f.keys())
            if key not in names:
                raise ArtifactError(f"{path} holds {names[:5]}, expected a tensor named '{key}' [n, d].")
            view = f.get_slice(key)
            shape, dtype = list(view.get_shape()), view.get_dtype()
            if len(shape) != 2:
                raise ArtifactError(f"{path}: '{key}' has {len(shape)} dimensions {shape}, expected 2: [n, d].")
            if dtype not in ("F32", "F16", "BF16"):
                raise ArtifactError(f"{path}: '{key}' has dtype {dtype}, expected F32, F16 or BF16.")
            if 0 in shape:
                raise ArtifactError(f"{path}: '{key}' is empty, shape {shape}; expected at least one virtual token.")
            tensor = f.get_tensor(key).to(torch.float32).contiguous()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file ({error}). It may be truncated.") from error
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NonFiniteError(
            f"{path}: {bad} of {tensor.numel()} values of '{key}' are NaN or infinite. "
            "Such a prompt scores a meaningless number; train it again with a lower learning rate."
        )
    return tensor
