"""Weights of a network: reading the files that people have, fetching what the hub has, hashing."""

import argparse
import hashlib
import json
import pickle
import re
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdad_dist.errors import WeightsError
from kdad_dist.wording import enumerated, kdad

HUB_PATIENCE = 4.0
"""Seconds. The hub's own client would retry for 46 s before it says that there is no network."""
PREFIXES = re.compile(r"^((module|model|backbone|encoder|network|student|teacher)\.)+")
"""What wrappers (DataParallel, Lightning, feature extractors, classifiers, ours) add to keys."""
UNPICKLING = (pickle.UnpicklingError, LookupError, TypeError, AttributeError, struct.error)
"""What torch's unpickler of plain tensors raises where a file holds other things, or noise."""
MANIFEST = "manifest.json"
MISSING = "missing"
ANOTHER = 0.9
"""Share of its tensors that do not match, from which on a network is called another one."""
NO_LAYERS: Mapping[str, int] = MappingProxyType({})
CONTAINERS = ("state_dict_ema", "state_dict", "model")
"""Where training checkpoints keep the network."""


def read_weights(path: Path, key: str = "method.teacher.weights") -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file, by key; no pickled code is ever run.

    Args:
        key: of the configuration, which names the file.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or holds more than tensors.
    """
    if (path / "config.yaml").is_file():
        raise WeightsError(
            f"{path} is the directory of a run; {key} takes a file of weights",
            f"set {key}={path / 'export' / 'student.safetensors'}, which `{kdad('export', path)}` "
            "writes",
        )
    if not path.is_file():
        remedy = f"check {key}"
        if path.parent.name == "export":
            remedy += (
                f"; `{kdad('export', path.parent.parent)}` writes it, once that run is trained"
            )
        raise WeightsError(f"there is no weights file {path}", remedy)
    check_export(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in {".pth", ".pt"}:
            # MAE's training checkpoints hold their command line; to unpickle that runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return _tensors(torch.load(path, map_location="cpu", weights_only=True), path)
    except UNPICKLING as error:
        raise WeightsError(
            f"{path} is not a plain file of tensors: loading it would run code, or it is damaged",
            "convert it to .safetensors where you trust it "
            "(safetensors.torch.save_file(model.state_dict(), FILE))",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else 'it is empty'}",
            "copy or download the file again",
        ) from error
    raise WeightsError(
        f"{path} is not a kind of weights file that is known",
        "give a .safetensors, .pth or .pt file",
    )


def check_export(path: Path) -> None:
    """Compares a file that `kdad export` wrote with the manifest that it put beside it.

    Raises:
        WeightsError: they differ.
    """
    try:
        manifest = json.loads(path.with_name(MANIFEST).read_bytes())
    except (OSError, ValueError):
        return
    entry = manifest.get(path.name) if isinstance(manifest, dict) else None
    if not isinstance(entry, dict):
        return  # of something else
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.get("sha256"):
        raise WeightsError(
            f"{path} is damaged: its content does not match the sha256 in {MANIFEST} beside it",
            "export it again, or copy both files again",
        )


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for key in CONTAINERS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        found = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if found:
            return found
    raise WeightsError(
        f"{path} holds no tensors by name", "save the network's state_dict(), or a dict with it"
    )


def canonical(key: str) -> str:
    """A key without wrappers' prefixes, and with timm's flattening undone.

    The same layer is `features.0.weight` in a classifier (timm, torchvision) and
    `features_0.weight` in timm's feature extractor.
    """
    return PREFIXES.sub("", key).replace(".", "_")


def by_name(weights: dict[str, Tensor], needed: Set[str], source: str) -> dict[str, Tensor]:
    """The tensors by their canonical names.

    Raises:
        WeightsError: a name that is needed stands for several tensors that differ, as where a file
            holds both networks of a training.
    """
    given: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    faults = []
    for key, tensor in weights.items():
        name = canonical(key)
        known = given.get(name) if name in needed else None
        if known is not None and not torch.equal(known.float(), tensor.float()):
            faults.append(f"{keys[name]} and {key}")
        given[name], keys[name] = tensor, key
    if faults:
        raise WeightsError(
            f"{source} holds more than one network: {len(faults)} tensors could be either of two "
            f"that differ{listed(faults)}",
            "save the tensors of the one that is meant in a file of their own "
            "(safetensors.torch.save_file(tensors, FILE))",
        )
    return given


def load_weights(
    network: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    keys: str = "method.teacher.backbone, method.teacher.layers",
    layer_of: Mapping[str, int] = NO_LAYERS,
) -> None:
    """Fills the network; what else the weights hold (head, deeper layers) is left aside.

    Args:
        keys: of the configuration, which say what the network is.
        layer_of: where tensors are those of layers that were chosen: of which one, by key.

    Raises:
        WeightsError: a tensor of the network is missing, has another shape, is not finite, or could
            be one of several; the message lists them.
    """
    own = network.state_dict()
    # The counter is of no use here, and files older than torch 0.4.1 lack it.
    needed = {key: canonical(key) for key in own if not key.endswith("num_batches_tracked")}
    given = by_name(weights, set(needed.values()), source)
    faults = {}
    for key, name in needed.items():
        tensor = given.get(name)
        if tensor is None:
            faults[key] = MISSING
        elif tensor.shape != own[key].shape:
            faults[key] = f"shape {tuple(tensor.shape)}, needed {tuple(own[key].shape)}"
        elif not tensor.isfinite().all():
            faults[key] = "holds NaN or infinity"
    if faults:
        raise _misfit(faults, set(needed), source, keys, layer_of)
    with torch.no_grad():
        for key, name in needed.items():
            own[key].copy_(given[name])


def _misfit(
    faults: Mapping[str, str],
    needed: Set[str],
    source: str,
    keys: str,
    layer_of: Mapping[str, int],
) -> WeightsError:
    """What to say of weights of which these tensors, by key, do not match."""
    lost = sorted({layer_of[key] for key in faults if key in layer_of})
    whole = {key for key in needed if layer_of.get(key) in lost}
    if set(faults.values()) == {MISSING} and set(faults) == whole != needed:
        number = f"layer{'s' * (len(lost) > 1)} {enumerated(list(map(str, lost)), len(lost))}"
        return WeightsError(
            f"{source} does not hold {number} of the backbone: all {len(faults)} tensors of it "
            f"are missing, the other {len(needed) - len(faults)} are there",
            "name only layers that it holds (method.teacher.layers), or weights of all of them",
        )
    lines = listed([f"{key}: {fault}" for key, fault in faults.items()])
    count = f"{len(faults)} of its {len(needed)} tensors do not match{lines}"
    if len(faults) >= ANOTHER * len(needed):
        return WeightsError(
            f"{source} is of another network than the backbone: {count}",
            f"name the backbone that the weights were made for ({keys})",
        )
    layers = ", or only layers that they hold" if "layers" in keys else ""
    return WeightsError(
        f"{source} does not fit the backbone: {count}",
        f"name the backbone that the weights were made for{layers} ({keys})",
    )


def tensors_hash(tensors: Mapping[str, Tensor], each: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of tensors: their names, and their values as float32, one after the other.

    Args:
        each: called after each of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().to("cpu", torch.float32).flatten().numpy().data)
        each()
    return digest.hexdigest()


def listed(faults: list[str]) -> str:
    """The first ten, each on a line of its own, and how many more there are."""
    more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "".join(f"\n  {line}" for line in [*faults[:10], *more])


def local_file(key: str, unfrozen: str = "") -> str:
    """What to do where the hub has no file or cannot be reached.

    Args:
        unfrozen: what else to set, lest random weights be frozen.
    """
    return (
        f"copy the file here and name it: {key}=FILE.safetensors (or FILE.pth); "
        f'or, to try things out without pretraining, {key}="random" {unfrozen}'
    ).rstrip()


def fetch(repository: str, filename: str, key: str, unfrozen: str = "") -> Path:
    """A file of the Hugging Face hub: from its cache without any request, else downloaded.

    Args:
        key: of the configuration, which could name a local file instead.
        unfrozen: as `local_file`.

    Raises:
        WeightsError: it is neither cached nor reachable; takes seconds.
    """
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    trouble = hub_trouble(HUB_PATIENCE)
    if trouble is None:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, filename))
        except OSError as error:  # of which all errors of the hub's client are kinds
            trouble = f"refused it: {str(error).splitlines()[0]}"
    raise WeightsError(
        f"the pretrained weights {repository} are not in {constants.HF_HUB_CACHE}, "
        f"and the hub {constants.ENDPOINT} {trouble}",
        f"where there is a network, download {constants.ENDPOINT}/{repository}/resolve/main/"
        f"{filename}; {local_file(key, unfrozen)}",
    )


def hub_trouble(patience: float) -> str | None:
    """Why the hub cannot be asked, found out in so many seconds at most; None where it can."""
    if constants.HF_HUB_OFFLINE:
        return "may not be asked (HF_HUB_OFFLINE is set)"
    answer = [f"did not answer within {patience:g} seconds"]

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310
            urllib.request.urlopen(request, timeout=patience).close()  # noqa: S310
        except urllib.error.HTTPError:
            pass  # it answered
        except (OSError, ValueError) as error:
            answer[0] = f"cannot be reached ({getattr(error, 'reason', error)})"
            return
        answer.clear()

    # A thread, because no timeout covers the name lookup, which may take half a minute.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answer[0] if answer else None
