"""What verbs have done, in words for a person."""

import json
import os
import sys
from typing import Any

from kdad_dist.wording import amount, printable

LOADING = "loading torch"


def say(text: str) -> None:
    """For a person: on stderr, once per launch."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr)


def answer(value: Any) -> None:
    """For a program: one JSON document on stdout, once per launch."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(value, indent=2))  # in ASCII: file names need not be UTF-8


def tell(text: str, facts: Any, as_json: bool) -> None:
    """For a person; and for a program, where one asks."""
    say(text)
    if as_json:
        answer(facts)


def judged(facts: dict[str, Any]) -> str:
    """What became of new images, for a person."""
    images = facts["images"]
    number = amount(images, "image")
    if "classes" in facts:
        found = ", ".join(f"{name} {count}" for name, count in facts["classes"].items() if count)
        return f"{number}: {found}"
    anomalous = facts["anomalous"]
    if anomalous is None:
        return f"{number}, not judged for want of a threshold"
    return f"{number}: {anomalous} anomalous, {images - anomalous} normal"


def exported(facts: dict[str, Any]) -> str:
    """What `kdad export` wrote, and how far it is from the run."""
    lines = [f"exported: {facts['path']} ({facts['bytes'] / 1e6:.1f} MB)"]
    if "tensors" in facts:
        equal, tensors = facts["tensors_of_checkpoint"], facts["tensors"]
        others = "; the others have LoRA merged into them" if facts["lora_merged"] else ""
        lines.append(
            f"compared with the checkpoint: {equal} of {tensors} tensors are the same{others}"
        )
    if "parity" in facts:
        lines += compared(facts["parity"])
    if "facts" not in facts:
        return "\n".join(lines)
    said = facts["facts"]
    if "classes" in said:
        relabelled = amount(facts["parity"]["images_relabelled"], "image")
        lines.append(f"  pred_label: another one for {relabelled}")
        return "\n".join([*lines, f"classes: {said['classes']}"])
    missing = "none: run `kdad score` first, with the same words, to have one in the file"
    return "\n".join([*lines, f"threshold: {said.get('threshold', missing)}"])


def compared(parity: dict[str, Any]) -> list[str]:
    """On what a file was compared with the run, and how far it is from it."""
    on = f"{parity['images']} of {parity['test_images']} test images"
    if parity["generated"]:
        on = f"{amount(parity['images'], 'image')} of noise ({parity['generated']})"
    lines = [f"compared with the run on {on}:"]
    for name, found in parity.items():
        match found:
            case {"largest_difference": largest, "largest_value": of}:
                lines.append(
                    f"  {name}: largest difference {largest:.2g}, of values up to {of:.3g}"
                )
            case {"run": float(ours), "exported": theirs}:
                number = amount(parity["images"], "image")
                lines.append(f"  {name}: {ours:.6f}, exported {theirs:.6f} (of {number})")
    return lines


def summary(packed: dict[str, Any]) -> str:
    """What `kdad pack` did, for a person."""
    lines = [f"layout: {packed['layout']}, because {packed['reason']}"]
    for split, categories in packed["counts"].items():
        for category, kinds in categories.items():
            found = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"{category} {split}: {found}")
    lines += [f"skipped: {path} ({reason})" for path, reason in packed["skipped"]]
    lines += [f"not used: {folder}" for folder in packed["unused"]]
    done = "was packed already" if packed["unchanged"] else amount(packed["shards"], "shard")
    lines.append(f"{amount(packed['images'], 'image')} in {packed['out']} ({done})")
    return "\n".join(lines)
