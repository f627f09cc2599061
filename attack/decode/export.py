"""Observations <-> one safetensors file, whole or not at all.

    step{S}.rank{R}.gradient, .known, .bound (where there is one)
    step{S}.rank{R}.{p,q,sent}{PARAMETER}, .known, .bound (of what was sent in place of a gradient)
    step{S}.mean.gradient, .known, .bound (where several ranks' mean is all that was seen)
    step{S}.weights, step{S}.buffers, step{S}.average (where known)

Before that stands `group{NAME}.` where it is not the group of all ranks that exchanged them. All are float32, or
float64 where the job's gradients are; known is uint8. The metadata's `gradtap` is JSON: format version, source, shapes,
and of each step and rank what is not a tensor. What is read back is checked before it is believed. Knows nothing of
captures or protocols.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attack.answer import victim_name
from attack.decode.recording import Recording
from attack.errors import DecodeError
from attack.observation import Factor, Known, Observation, Shapes

FORMAT = 1
_KEY = re.compile(
    r"(group.+\.)?step\d+\.((rank\d+|mean)\.(gradient|known|bound|(p|q|sent)\d+(\.known|\.bound)?)|weights|buffers|average)"
)


def write_observations(
    source: Recording | Iterable[Observation],
    path: str | os.PathLike[str],
    *,
    update_rule: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Writes them all. A safetensors file begins with the sizes of all tensors, so they are held until the end.

    Args:
        source: observations, or what has them.
        path: file to write.
        update_rule: asked at the end what kept the weights in step; plain values, which `read_header` gives back.

    Returns:
        Plain values: `observations`, `steps`, `complete`, and over all elements `known_fraction` and `exact_fraction`.
    """
    if isinstance(source, Recording):
        label, observations = os.fspath(source.path), source.observations()
    else:
        label, observations = "", iter(source)
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    shapes: dict[str | None, Shapes] = {}
    elements = known = exact = 0
    for seen in observations:
        rank, step = _names(seen.group, seen.step, seen.rank)
        tensors |= {f"{rank}.gradient": seen.gradient, f"{rank}.known": seen.known}
        for name, tensor in (
            (f"{rank}.bound", seen.bound),
            (f"{step}.weights", seen.weights),
            (f"{step}.buffers", seen.buffers),
            (f"{step}.average", seen.average),
        ):
            if tensor is not None:
                tensors[name] = tensor
        for factor in seen.factors:
            name = f"{rank}.{factor.name}{factor.parameter}"
            tensors |= {name: factor.values, f"{name}.known": factor.known, f"{name}.bound": factor.bound}
        shapes[seen.group] = seen.shapes
        entries.append(
            {
                "step": seen.step,
                "rank": seen.rank,
                "world_size": seen.world_size,
                "exchange": seen.exchange,
                "group": seen.group,
                "ranks": list(seen.ranks),
                "defense": seen.defense,
                "factors": [{"parameter": factor.parameter, "name": factor.name} for factor in seen.factors],
            }
        )
        elements += seen.known.numel()
        known += int(seen.limited.sum())
        exact += int((seen.known == Known.RAW).sum())
    first = next(iter(shapes.values()), ())
    document = {
        "version": FORMAT,
        "source": label,
        "shapes": shapes.get(None, first),
        "groups": {group: {"shapes": value} for group, value in shapes.items() if group is not None},
        "update_rule": update_rule(),
        "observations": entries,
    }
    _save(tensors, {"gradtap": json.dumps(document)}, Path(path))
    return {
        "observations": len(entries),
        "steps": len({(entry["group"], entry["step"]) for entry in entries}),
        "complete": sum(
            bool((tensors[f"{_names(e['group'], e['step'], e['rank'])[0]}.known"] != 0).all()) for e in entries
        ),
        "known_fraction": known / elements if elements else 0.0,
        "exact_fraction": exact / elements if elements else 0.0,
    }


def read_observations(path: str | os.PathLike[str]) -> Iterator[Observation]:
    """The observations of a file that `write_observations` wrote, in the same order, one at a time.

    Raises: DecodeError, in one line, where the file is not one, or is damaged.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            document = _document(path, file.metadata())
            names = set(file.keys())
            if strange := [name for name in names if not _KEY.fullmatch(name)]:
                raise DecodeError(f"{path}: no observation has a tensor {strange[0]!r:.80}")
            groups = document.get("groups", {})
            for entry in document["observations"]:
                group = None if entry.get("group") is None else str(entry["group"])
                rank, step = _names(group, int(entry["step"]), int(entry["rank"]))
                found = document.get("shapes", ()) if group is None else groups[group]["shapes"]
                shapes = tuple(tuple(map(int, shape)) for shape in found)
                tensors = {
                    name: file.get_tensor(key) if key in names else None
                    for name, key in {
                        **{name: f"{rank}.{name}" for name in ("gradient", "known", "bound")},
                        **{name: f"{step}.{name}" for name in ("weights", "buffers", "average")},
                    }.items()
                }
                factors = tuple(_factor(file, rank, one) for one in entry.get("factors", ()))
                yield _observation(f"{path}: {rank}", entry, tensors, shapes, factors)
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"{path}: not a file of observations, or a damaged one: {error!r:.200}") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file that `write_observations` wrote. Raises: DecodeError, in one line."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return _document(path, file.metadata())
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise DecodeError(f"{path}: not a file of observations, or a damaged one: {error!r:.200}") from None


def _document(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> dict[str, Any]:
    document = json.loads((metadata or {}).get("gradtap", "null"))
    if not isinstance(document, dict) or document.get("version") != FORMAT:
        raise DecodeError(f"{path}: wanted observations of format {FORMAT}; was it written by gradtap decode?")
    return document


def _names(group: str | None, step: int, rank: int) -> tuple[str, str]:
    """What the tensors of a rank at a step begin with, and those of all ranks."""
    within = "" if group is None else f"group{group}."
    return f"{within}{victim_name(rank, step)}", f"{within}step{step}"


def _factor(file: Any, rank: str, entry: dict[str, Any]) -> Factor:
    """What a rank sent in place of a gradient. Raises: SafetensorError, ValueError."""
    parameter, name = int(entry["parameter"]), str(entry["name"])
    where = f"{rank}.{name}{parameter}"
    values, known, bound = (file.get_tensor(f"{where}{part}") for part in ("", ".known", ".bound"))
    if known.dtype != torch.uint8 or not values.shape == known.shape == bound.shape:
        raise ValueError(f"{where}: its mask or its bound is not that of its values")
    return Factor(parameter=parameter, name=name, values=values, known=known, bound=bound)


def _observation(
    where: str,
    entry: dict[str, Any],
    tensors: dict[str, Tensor | None],
    shapes: tuple[tuple[int, ...], ...],
    factors: tuple[Factor, ...],
) -> Observation:
    double = tensors["gradient"] is not None and tensors["gradient"].dtype == torch.float64
    floating = torch.float64 if double else torch.float32
    for name, tensor in tensors.items():
        wanted = torch.uint8 if name == "known" else floating
        if tensor is None and name in ("gradient", "known"):
            raise DecodeError(f"{where}: the tensor {name} is missing")
        if tensor is not None and (tensor.dtype != wanted or tensor.ndim != 1):
            raise DecodeError(f"{where}: {name}: wanted a flat {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")
    gradient, known, bound = tensors["gradient"], tensors["known"], tensors["bound"]
    assert gradient is not None and known is not None
    if known.numel() != gradient.numel() or sum(torch.Size(shape).numel() for shape in shapes) != gradient.numel():
        raise DecodeError(
            f"{where}: wanted {gradient.numel()} elements by the gradient, the mask and the shapes differ"
        )
    if (known > max(Known)).any() or (bound is None and (known >= Known.DIFFERENCED).any()):
        raise DecodeError(f"{where}: the mask holds what it cannot, or a bound is missing")
    return Observation(
        rank=int(entry["rank"]),
        step=int(entry["step"]),
        world_size=int(entry["world_size"]),
        exchange=str(entry["exchange"]),
        group=None if entry.get("group") is None else str(entry["group"]),
        gradient=gradient,
        known=known,
        bound=bound,
        average=tensors["average"],
        weights=tensors["weights"],
        buffers=tensors["buffers"],
        shapes=shapes,
        ranks=tuple(map(int, entry.get("ranks", ()))),
        factors=factors,
        defense=None if entry["defense"] is None else str(entry["defense"]),
    )


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Writes beside the target, then renames: nobody ever sees half a file, and a full disk leaves the old one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's file is for its owner alone
        os.replace(name, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)
