"""`gradtap inspect FILE`: what a capture holds, before anybody attacks anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from attack.decode.recording import Recording
from nodes.commands.base import Command, Result
from nodes.console import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """What a capture holds: connections, protocols, ranks, steps, shapes, and every hole in it."""

    file: tyro.conf.Positional[Path]
    """Capture file: pcapng, or classic pcap."""

    def run(self) -> Result:
        """Reads the capture once."""
        found = Recording(self.file).inspect()
        return Result(json=found, text=_text(found))


def _text(found: dict[str, Any]) -> str:
    flows = [
        [flow["source"], flow["destination"], flow["protocol"], flow["bytes"], len(flow.get("gaps", []))]
        for flow in found["flows"]
    ]
    said = [
        [group["group"] or "all ranks", ", ".join(map(str, group["ranks"] or ())) or "not known", one["kind"], *numbers]
        for group in found.get("groups", [])
        for one in group["collectives"]
        for numbers in [[one["count"], one["messages"], one["bytes"]]]
    ]
    steps = [
        [rank.get("group", ""), step["step"], _who(rank), rank["complete"], f"{100 * rank['known_fraction']:.4g} %"]
        for step in found["steps"]
        for rank in step["ranks"]
    ]
    parts = [table(["from", "to", "protocol", "bytes", "holes"], flows, title="Connections")]
    if said:
        parts.append(table(["group", "ranks", "collective", "times", "messages", "bytes"], said, title="Collectives"))
    if steps:
        headings = ["group", "step", "rank", "complete", "known"]
        if not any(row[0] for row in steps):
            headings, steps = headings[1:], [row[1:] for row in steps]
        parts.append(table(headings, steps, title="Gradients"))
    parameters = found.get("parameters") or {}
    if parameters.get("count"):
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in parameters["shapes"])
        parts.append(f"{parameters['count']} parameters: {shapes}")
    parts.append(
        f"Encrypted: {'yes' if found['encrypted'] else 'no'}. World size: {found['world_size'] or 'not seen'}."
    )
    parts += [describe_sealed(entry) for entry in found.get("sealed", []) if entry["messages"]]
    parts += [f"- {note}" for note in found.get("notes", [])]
    return "\n".join(parts)


def _who(rank: dict[str, Any]) -> str:
    return f"mean of {', '.join(map(str, rank['ranks']))}" if "ranks" in rank else str(rank["rank"])


def describe_sealed(entry: dict[str, Any]) -> str:
    """What the sizes and times of one sealed direction still say, in one line."""
    said = f"{entry['source']} > {entry['destination']}: {entry['mechanism']}, no gradient is decoded; "
    said += f"{entry['messages']} sealed messages, {entry['bytes']} bytes"
    if (estimate := entry["estimate"]) is None:
        return f"{said}; their sizes do not repeat."
    return (
        f"{said}. Their sizes repeat, {estimate['steps']} times {estimate['bytes_per_step']} bytes, once in "
        f"{estimate['step_seconds']:.3g} s: a step, or one of its equal parts."
    )
