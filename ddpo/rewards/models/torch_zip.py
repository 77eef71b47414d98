"""Read tensors from a file written by ``torch.save``, without running what is in it.

Such a file (torch 1.6 and later) is a zip with an entry of raw bytes per storage, and `data.pkl`, a
program for a small stack machine that says which tensor is which part of which storage. Unpickling
runs that program, which may call anything it names. Here it is only read: `pickletools` decodes it
into instructions, and the few that build a table of tensors are followed. A name in it remains a
string, which is compared and neither imported nor called; a call of an unknown name yields an empty
placeholder.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpo.errors import RewardError

_DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_SAFETENSORS = (
    "Have someone who trusts the file, or a sandbox, convert it to safetensors "
    "(safetensors.torch.save_file), and name that"
)


@dataclass(frozen=True)
class _Name:
    """A module and a name in it, as written in the program. Never looked up."""

    text: str


class _Unknown:
    """Stands for the result of calling an unknown name."""


def read_torch_zip(path: Path) -> dict[str, Any]:
    """Read the tensors in a file written by ``torch.save``.

    Args:
        path: The file; usually `.pt`, `.pth` or `.bin`.

    Returns:
        The saved mapping, on the CPU: tensors and nested mappings by name, plain values, and
        placeholders for other objects.

    Raises:
        RewardError: The file has the format before torch 1.6, is damaged, or contains no mapping.
    """
    if not zipfile.is_zipfile(path):
        raise RewardError(
            f"{path} is not a zip as written by torch.save since 1.6; an older file can only be "
            f"unpickled, which may run anything. {_SAFETENSORS}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            tree = _read(archive)
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError),
        *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    ) as error:
        raise RewardError(
            f"cannot read {path} as a file of torch.save ({type(error).__name__}: {error}); it is "
            f"damaged, or contains more than tensors. Download it again. Or: {_SAFETENSORS}"
        ) from error
    if not isinstance(tree, dict):
        raise RewardError(f"{path} does not contain a mapping of tensors by name. {_SAFETENSORS}")
    return tree


def _read(archive: zipfile.ZipFile) -> Any:
    program = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
    if program is None:
        raise ValueError("it has no data.pkl")
    root = program.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Tensor] = {}

    def storage(kind: str, key: str) -> Tensor:
        if key not in storages:
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a zip bomb does
                raise ValueError(f"its storage {key} is compressed")
            data = bytearray(archive.read(entry))
            dtype = _DTYPES[kind]
            storages[key] = (
                torch.frombuffer(data, dtype=dtype) if data else torch.empty(0).to(dtype)
            )
        return storages[key]

    return _follow(archive.read(program), storage)


def _follow(program: bytes, storage: Callable[[str, str], Tensor]) -> Any:
    """Follow the instructions that build containers, numbers, strings and tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for operation, argument, _ in pickletools.genops(program):
        slot: Any = argument  # in the memo, for instructions that use it
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[slot] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[slot])
            case "GLOBAL":
                stack.append(_Name(str(argument)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(f"{module} {name}"))
            case "BINPERSID":
                _, kind, key, *_ = stack.pop()
                stack.append(storage(kind.text, key))
            case "REDUCE" | "NEWOBJ":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(_call(callee, arguments))
            case "BUILD":  # attributes of an object, which never hold tensors in a state dict
                stack.pop()
            case "APPEND" | "APPENDS":
                items = since_mark() if operation.name == "APPENDS" else [stack.pop()]
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = (
                    since_mark() if operation.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                )
                if isinstance(stack[-1], dict):
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case name if name.removeprefix("SHORT_").startswith(_LITERALS):
                stack.append(argument)
            case name:
                raise ValueError(f"its index contains the instruction {name}")
    raise ValueError("its index has no end")


_LITERALS = ("BININT", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "BINSTRING", "BINBYTES")


def _call(callee: Any, arguments: Any) -> Any:
    """Return what a known name would return for these arguments, without calling it."""
    match callee:
        case _Name("collections OrderedDict"):
            return dict(*arguments)
        case _Name("torch._utils _rebuild_tensor_v2"):
            storage, offset, size, stride, *_ = arguments
            return torch.as_strided(storage, size, stride, offset)
        case _Name("torch._utils _rebuild_parameter"):
            return arguments[0]
        case _:
            return _Unknown()
