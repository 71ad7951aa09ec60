"""Vision transformers of the Hugging Face hub, or of a folder in its form: the only place that
knows `transformers`, which is imported only where such a teacher is asked for.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from kdad_dist.config.methods import VitTeacherConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError, WeightsError
from kdad_dist.models.tokens import Colours, Form, TokenNet, Tokens, check_layers
from kdad_dist.models.weights import UNPICKLING, fetch, listed

KEY = "method.teacher.backbone"
SETTINGS, COLOURS = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NO_CODE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Not left to the default: where a folder brings code, that is to ask on the terminal."""
MASKED = "vit_mae"
FORM = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")


class HubTokens(TokenNet):
    def __init__(self, network: Any, form: Form, layers: Sequence[int], colours: Colours) -> None:
        super().__init__(form, layers, colours)
        self.network = network

    def tokens(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        states = self.network(pixel_values=image, output_hidden_states=True).hidden_states
        return tuple(states[layer] for layer in self.layers)


def build_hub_tokens(
    config: VitTeacherConfig, image_size: int, seed: int, colours: Colours | None
) -> TokenNet:
    """The network of a folder, or of an id of the hub.

    Args:
        colours: None: those that its preprocessor expects.

    Raises:
        ConfigError: there is neither, it is no vision transformer, has no such layer, or wants
            another image size.
        WeightsError: a file of it is missing, cannot be fetched, or does not hold all weights.
    """
    import transformers  # takes seconds, which other methods need not wait for

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters is an error below
    name = config.backbone
    if config.weights not in {"pretrained", "random"}:
        raise ConfigError(
            f"method.teacher.weights is {config.weights}, and {name} is a folder, or an id of the "
            "hub, with weights of its own",
            f'write method.teacher.weights=pretrained (or "random"), or name a folder as {KEY}',
        )
    folder = Path(name)
    if not folder.is_dir():
        refuse_no_id(name)
        folder = fetched(name, config.weights, colours is None)
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{folder} holds no network that transformers knows: {str(error).splitlines()[0]}",
            f"{KEY} is a folder with {SETTINGS} and {WEIGHTS[0]}",
        ) from error
    refuse_kernels(folder, settings)
    form = form_of(name, settings, config.layers, image_size)
    with seeded(seed, "teacher"):
        if config.weights == "random":
            network = transformers.AutoModel.from_config(settings, trust_remote_code=False)
        else:
            network = pretrained(transformers.AutoModel, folder)
    network = network.float().eval()
    form = form._replace(prefix=prefix_of(name, network, form, image_size))
    return HubTokens(network, form, config.layers, colours or read_colours(folder))


def prefix_of(name: str, network: Any, form: Form, image_size: int) -> int:
    """How many tokens of each layer belong to no patch.

    Raises:
        ConfigError: the tokens of some layer are not one for each patch, behind these.
    """
    with torch.no_grad():
        image = torch.zeros(1, 3, image_size, image_size)
        try:
            states = network(pixel_values=image, output_hidden_states=True).hidden_states
        except RuntimeError as error:
            raise ConfigError(
                f"{name} cannot read an image of {image_size} pixels: {str(error).splitlines()[0]}",
                f"choose another {KEY}",
            ) from error
    shapes = [tuple(state.shape[1:]) for state in states]
    prefix = shapes[-1][0] - form.grid**2
    wrong = [shape for shape in shapes if shape != (form.grid**2 + prefix, form.width)]
    if prefix < 0 or wrong:
        found = (wrong or shapes)[0]
        raise ConfigError(
            f"{name} gives {' x '.join(map(str, found))} numbers after a block; a vision "
            f"transformer of {form.grid} x {form.grid} patches would give {form.width} for each "
            "of them",
            f"choose another {KEY}, one that keeps a token for each patch in every block",
        )
    return prefix


def refuse_kernels(folder: Path, settings: Any) -> None:
    """Raises WeightsError where attention is to be computed by a program of the hub."""
    asked = str(settings._attn_implementation or "")
    if "/" in asked:
        raise WeightsError(
            f"{folder / SETTINGS} asks for code of the hub, {asked!r}, which is not run",
            "remove the line from the file",
        )


def form_of(name: str, settings: Any, layers: Sequence[int], image_size: int) -> Form:
    """The form that the settings tell of, but for the tokens that belong to no patch.

    Raises:
        ConfigError: it is no vision transformer, has no such layer, or wants another image size.
    """
    if settings.model_type == MASKED:
        raise ConfigError(
            f"{name} is a {MASKED}, whose network hides patches and shuffles the rest at random",
            f"choose another {KEY}, such as the encoder in timm: vit_base_patch16_224.mae",
        )
    numbers: list[Any] = [getattr(settings, key, None) for key in FORM]
    width, depth, patch, side = numbers
    if not all(isinstance(number, int) for number in numbers) or side % patch:
        raise ConfigError(
            f"{name} is a {settings.model_type}, not a vision transformer whose square patches "
            "divide a square image",
            f"choose another {KEY}",
        )
    channels = getattr(settings, "num_channels", 3)
    if channels != 3:
        raise ConfigError(
            f"{name} takes images of {channels} channel{'s' * (channels != 1)}; ours have three, "
            "grey ones three that are equal",
            f"choose another {KEY}",
        )
    check_layers(name, layers, depth)
    if side != image_size:
        raise ConfigError(
            f"{name} is made for images of {side} pixels, and data.image_size (or data.tile) is "
            f"{image_size}",
            f"set data.image_size={side}, or cut larger images: data.tile={side}",
        )
    return Form(width, 0, patch, side // patch)


def refuse_no_id(name: str) -> None:
    """Raises ConfigError where a name, of which there is no folder, could be no id of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"there is no folder {name} (and it is no id OWNER/NAME of the hub)", f"check {KEY}"
        ) from None


def fetched(name: str, weights: str, colours: bool) -> Path:
    """The folder of the hub's cache with what is needed of an id."""
    try:
        folder = fetch(name, SETTINGS, KEY).parent
        if colours:
            fetch(name, COLOURS, KEY)
        if weights == "pretrained":
            try:
                fetch(name, WEIGHTS[0], KEY)
            except WeightsError:
                fetch(name, WEIGHTS[1], KEY)
    except WeightsError as error:
        raise WeightsError(
            f"there is no folder {name}, and as an id of the hub: {error.problem}",
            f"where there is a network, run `hf download {name} --local-dir FOLDER`, copy the "
            f"folder here and name it: {KEY}=FOLDER",
        ) from error
    return folder


def pretrained(model: Any, folder: Path) -> Any:
    """The network with the folder's weights, of which none may be missing but a pooler's."""
    try:
        network, found = model.from_pretrained(folder, output_loading_info=True, **NO_CODE)
    except (OSError, ValueError, RuntimeError, SafetensorError, *UNPICKLING) as error:
        raise WeightsError(
            f"the weights in {folder} cannot be read: {str(error).splitlines()[0]}",
            f"it needs {' or '.join(WEIGHTS)}, made for its {SETTINGS}",
        ) from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler"))
    faults = [*missing, *(str(key) for key in found["mismatched_keys"])]
    if faults:
        raise WeightsError(
            f"the weights in {folder} lack {len(faults)} tensors of the network, or have them in "
            f"another shape:{listed(faults)}",
            f"take the weights that were made for its {SETTINGS}",
        )
    return network


def read_colours(folder: Path) -> Colours:
    """Mean and deviation that the network's preprocessor subtracts and divides by."""
    try:
        found = json.loads((folder / COLOURS).read_text(encoding="utf-8"))
        colours = Colours(found["image_mean"], found["image_std"])
        assert len(colours.mean) == len(colours.std) == 3
        return colours
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise WeightsError(
            f"{folder / COLOURS} does not say which mean and deviation the images should have",
            "copy it from where the weights come from, or set method.normalize=imagenet or none",
        ) from error
