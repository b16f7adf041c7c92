"""Requests, responses and events of the OpenAI images API, and what is added to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_PICTURES = 10
MOST_PREVIEWS = 3
MOST_GUIDANCE = 100.0
SEEDS = 1 << 32

Format = Literal["png", "webp", "jpeg"]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]
Short = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Field(max_length=32_000)]


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`; null is the default everywhere.

    `seed`, `negative_prompt`, `guidance_scale` and `plan` are ours. Fields that mean nothing to
    these models (`quality`, `style`, `moderation`, users) are taken and left.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[Text, Field(description="What to draw.", min_length=1)]
    model: Annotated[Short | None, Field(description="Any name; the loaded model answers.")] = None
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES, strict=True)] | None = None
    size: Annotated[Short | None, Field(description='"auto", or a size of `/v1/models`.')] = None
    quality: Quality | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["low", "auto"] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100, strict=True)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS, strict=True)] | None = None
    user: Short | None = None
    safety_identifier: Short | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS, strict=True)] | None = None
    negative_prompt: Text | None = None
    guidance_scale: (
        Annotated[float, Field(ge=-MOST_GUIDANCE, le=MOST_GUIDANCE, strict=True)] | None
    ) = None
    plan: Annotated[Short | None, Field(description="A plan of `/v1/models`.")] = None


class TextAndImage(BaseModel):
    """Tokens of either kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens read from prompts, and drawn."""

    input_tokens: int
    input_tokens_details: TextAndImage
    output_tokens: int
    total_tokens: int


class Picture(BaseModel):
    """One picture; `url` is a data URL. The same seed draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """The answer to a request that does not stream."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    quality: Quality
    size: str
    usage: Usage


class ImageEvent(BaseModel):
    """One event of a stream: a preview with its index, or the picture with its usage."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: Format
    seed: int
    partial_image_index: int | None = None
    usage: Usage | None = None


class Told(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """The body of every error."""

    error: Told


class ModelCard(BaseModel):
    """A model of the list, with the plans and sizes it is served with."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sparvar_jax"
    plans: list[str]
    sizes: list[str]


class ModelList(BaseModel):
    """The models served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether pictures are drawn, and how many wait and are being drawn."""

    status: Literal["ok", "stopped"]
    model: str
    waiting: int
    drawing: int
