"""The table of model families: the one place that names Qwen3-VL. Nothing of it is imported before it is asked for.

To add a family whose processor shows pictures as patches and grids (`Media`), as those of the Qwen-VL line do:

1. here, a row in `BACKBONES`; where it lays out tokens or positions in another way, a subclass that overrides a method;
2. in `integrations/vllm/model.py`, one line that makes its class for vLLM, under the name in `VllmParts.latent`;
3. in `tests/model/test_backbone.py`, its row.

Which modules FSDP wraps is not in the table: verl and EasyR1 read it from the class itself (`_no_split_modules`).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from future_l1_plugin.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """A name in another package, which is imported by `load` and not before."""

    module: str
    name: str

    def load(self) -> Any:
        return getattr(import_module(self.module), self.name)


@dataclass(frozen=True)
class Media:
    """Pictures, or videos, in a processor's output.

    pixels: key of Float (P, D), the patches of all items.
    grid: key of Long (items, 3), the patches of each item in time, height and width.
    kind: their name in vLLM; `KIND_token_id` in the configuration is the id that stands for their features.
    """

    kind: str
    pixels: str
    grid: str

    def token_id(self, config: Any) -> int:
        return getattr(config, f"{self.kind}_token_id")


PICTURES = Media("image", "pixel_values", "image_grid_thw")
VIDEOS = Media("video", "pixel_values_videos", "video_grid_thw")
#: In the order of the numbers that `mm_token_type_ids` gives them, from 1.
MEDIA = (PICTURES, VIDEOS)
PIXEL_KEYS, GRID_KEYS = tuple(media.pixels for media in MEDIA), tuple(media.grid for media in MEDIA)
MEDIA_KEYS = tuple(key for media in MEDIA for key in (media.pixels, media.grid))
#: What a processor returns with one value a token, (B, T).
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class VllmParts:
    """Where vLLM keeps a family.

    latent: the name of our class for it in `integrations.vllm.model`.
    model, processor, info, dummy_inputs: the stock class, and what is registered with it.
    fields: function of the merge size that gives the function from tensors to vLLM's fields of them.
    """

    latent: str
    model: Ref
    processor: Ref
    info: Ref
    dummy_inputs: Ref
    fields: Ref


@dataclass(frozen=True)
class Backbone:
    """A model family.

    Attributes:
        name: what users call it.
        model_type: what config.json calls it.
        model, inner, config: transformers' class with the language head, the one in it that holds vision tower and text
            decoder, and their configuration.
        processor, image_processor, video_processor: transformers' classes.
        resize: function of the size of a video that the video processor resizes by.
        vision, text: attributes of the inner module: the vision tower, the text decoder.
        image_token, video_token, start_token, end_token: text that stands for a picture or video, and around it.
        latent_architecture: the name of our class in vLLM's registry.
        released: names that released checkpoints have under `architectures`; all are `model` with latent keys.
        opening: those of them whose responses begin with a latent span.
        vllm: see there.
        easyr1_positions: EasyR1's function of M-RoPE positions; None = EasyR1 does not train this family.
    """

    name: str
    model_type: str
    model: Ref
    inner: Ref
    config: Ref
    processor: Ref
    image_processor: Ref
    video_processor: Ref
    resize: Ref
    vision: str
    text: str
    image_token: str
    video_token: str
    start_token: str
    end_token: str
    latent_architecture: str
    released: tuple[str, ...]
    opening: tuple[str, ...]
    vllm: VllmParts
    easyr1_positions: Ref | None = None

    @property
    def image_text(self) -> str:
        """What the chat template writes for a picture."""
        return f"{self.start_token}{self.image_token}{self.end_token}"

    @property
    def video_text(self) -> str:
        """What the chat template writes for a video, and the processor for each of its temporal patches."""
        return f"{self.start_token}{self.video_token}{self.end_token}"

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """What no question may spell."""
        return self.start_token, self.end_token, self.image_token, self.video_token

    def new_config(
        self, text: dict[str, Any], vision: dict[str, Any], image: int, video: int, start: int, end: int, tied: bool
    ) -> Any:
        """A configuration, for models made from nothing.

        Args:
            text, vision: sizes of text decoder and vision tower, under transformers' names; not changed.
            image, video, start, end: ids of the media tokens.
            tied: one matrix embeds tokens and gives the logits.
        """
        return self.config.load()(
            text_config=deepcopy(text),  # transformers writes into nested dicts
            vision_config=deepcopy(vision),
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=tied,
        )

    def video_times(self, processor: Any, indices: Sequence[int], fps: float) -> list[float]:
        """The time of each temporal patch, in seconds, of a video whose shown frames have these indices at `fps`."""
        return processor._calculate_timestamps(list(indices), fps, processor.video_processor.temporal_patch_size)

    def spelled_video(self, times: Sequence[float]) -> str:
        """What the processor makes of `video_text`, with one placeholder a temporal patch."""
        return "".join(f"<{time:.1f} seconds>{self.video_text}" for time in times)

    def video_tokens(self, processor: Any, frames: int, height: int, width: int) -> int:
        """Tokens of one temporal patch of a video. Raises ValueError for what the processor refuses.

        Args:
            frames: how many are shown; height and width are theirs, in pixels, before they are resized.
        """
        video = processor.video_processor
        factor = video.patch_size * video.merge_size
        height, width = self.resize.load()(
            frames,
            height,
            width,
            temporal_factor=video.temporal_patch_size,
            factor=factor,
            min_pixels=video.size["shortest_edge"],
            max_pixels=video.size["longest_edge"],
        )
        return (height // factor) * (width // factor)

    def positions(self, inner: "nn.Module", inputs: Mapping[str, Any], mask: "Tensor") -> "Tensor":
        """M-RoPE positions, Long (3, B, T).

        Args:
            inputs: what the processor returned; of it ids, token types Long (B, T) and grids are used.
            mask: Long (B, T).
        """
        grids = {key: inputs[key] for key in GRID_KEYS if key in inputs}
        found, _ = inner.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=mask, **grids
        )
        return found

    def image_features(
        self, inner: "nn.Module", pixels: "Tensor", grid: "Tensor"
    ) -> tuple[Sequence["Tensor"], Sequence["Tensor"]]:
        """What the vision tower makes of pictures, as `PICTURES` has them.

        Returns:
            (for each picture (n_i, H), which takes the place of its n_i placeholders; what else goes into the decoder:
            (sum n_i, H) for each layer that it is added to).
        """
        seen = inner.get_image_features(pixels, grid, return_dict=True)
        return seen.pooler_output, seen.deepstack_features


@dataclass(frozen=True)
class Core:
    """The module of a model that holds vision tower and text decoder, and its family, by whose rules it is used."""

    family: Backbone
    module: "nn.Module"

    @property
    def vision(self) -> "nn.Module":
        return getattr(self.module, self.family.vision)

    @property
    def text(self) -> "nn.Module":
        return getattr(self.module, self.family.text)

    @property
    def width(self) -> int:
        """H, of the text decoder."""
        return self.module.config.text_config.hidden_size

    def positions(self, inputs: Mapping[str, Any], mask: "Tensor") -> "Tensor":
        """See `Backbone.positions`."""
        return self.family.positions(self.module, inputs, mask)

    def image_features(self, pixels: "Tensor", grid: "Tensor") -> tuple[Sequence["Tensor"], Sequence["Tensor"]]:
        """See `Backbone.image_features`."""
        return self.family.image_features(self.module, pixels, grid)


_QWEN3_VL = "transformers.models.qwen3_vl"
_VLLM_QWEN3_VL = "vllm.model_executor.models.qwen3_vl"

QWEN3_VL = Backbone(
    name="Qwen3-VL",
    model_type="qwen3_vl",
    model=Ref("transformers", "Qwen3VLForConditionalGeneration"),
    inner=Ref(f"{_QWEN3_VL}.modeling_qwen3_vl", "Qwen3VLModel"),
    config=Ref("transformers", "Qwen3VLConfig"),
    processor=Ref("transformers", "Qwen3VLProcessor"),
    image_processor=Ref("transformers", "Qwen2VLImageProcessor"),
    video_processor=Ref("transformers", "Qwen3VLVideoProcessor"),
    resize=Ref(f"{_QWEN3_VL}.video_processing_qwen3_vl", "smart_resize"),
    vision="visual",
    text="language_model",
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    start_token="<|vision_start|>",
    end_token="<|vision_end|>",
    latent_architecture="FutureL1_Qwen3VL",
    released=("SwimBird_Qwen3VL", "FutureL1_Qwen3VL", "RICE_Qwen3VL"),
    opening=("RICE_Qwen3VL",),
    vllm=VllmParts(
        latent="LatentQwen",
        model=Ref(_VLLM_QWEN3_VL, "Qwen3VLForConditionalGeneration"),
        processor=Ref(_VLLM_QWEN3_VL, "Qwen3VLMultiModalProcessor"),
        info=Ref(_VLLM_QWEN3_VL, "Qwen3VLProcessingInfo"),
        dummy_inputs=Ref(_VLLM_QWEN3_VL, "Qwen3VLDummyInputsBuilder"),
        fields=Ref("vllm.model_executor.models.qwen2_vl", "_create_qwen2vl_field_factory"),
    ),
    easyr1_positions=Ref("verl.models.transformers.qwen3_vl", "get_rope_index"),
)

#: By `model_type`.
BACKBONES = {family.model_type: family for family in (QWEN3_VL,)}
#: The names of all, for messages.
NAMES = " or ".join(family.name for family in BACKBONES.values())


def by_type(model_type: str | None, where: Any) -> Backbone:
    """The family of this `model_type`. Raises CheckpointError, which names `where`: there is none."""
    if model_type not in BACKBONES:
        raise CheckpointError(
            f"{where}: expected model_type {' or '.join(map(repr, BACKBONES))}, found {model_type!r}. "
            f"Only {NAMES} is supported."
        )
    return BACKBONES[model_type]


def by_config(config: Any, where: Any = None) -> Backbone:
    """The family of a transformers configuration. Raises CheckpointError, which names `where`: none of ours."""
    return by_type(
        getattr(config, "model_type", None), where or getattr(config, "_name_or_path", "") or "configuration"
    )


def by_processor(processor: Any) -> Backbone:
    """The family of a processor. Raises CheckpointError: none of ours."""
    names = [kind.__name__ for kind in type(processor).__mro__]
    for family in BACKBONES.values():
        if family.processor.name in names:
            return family
    raise CheckpointError(f"expected a processor of {NAMES}, found {names[0]}. Is it the checkpoint's own?")


def core_of(model: "nn.Module") -> Core:
    """The module with vision tower and text decoder inside a bare, PEFT-, DDP- or FSDP-wrapped model.

    Raises TypeError: there is none.
    """
    for module in model.modules():
        family = BACKBONES.get(getattr(getattr(module, "config", None), "model_type", None))
        if family is not None and {family.vision, family.text} <= set(module._modules):
            return Core(family, module)
    raise TypeError(f"{type(model).__name__}: found no {NAMES} with vision tower and text decoder in it")


def vision_pattern() -> str:
    """A regular expression of the names of modules in the vision tower, of any family."""
    return "|".join(rf".*\b{name}\b.*" for name in sorted({family.vision for family in BACKBONES.values()}))


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """The ids that stand for features, in the order of `MEDIA`. A response cannot hold them: M-RoPE would break."""
    return tuple(media.token_id(config) for media in MEDIA)


def token_types(ids: "Tensor", config: Any) -> "Tensor":
    """`mm_token_type_ids` as the processor makes them, Long like `ids`: 0 text, 1 a picture's, 2 a video's."""
    image, video = placeholder_ids(config)
    return (ids == image).long() + 2 * (ids == video).long()


def patches_per_token(config: Any) -> int:
    """Patches that the vision tower merges into one feature."""
    return config.vision_config.spatial_merge_size**2
