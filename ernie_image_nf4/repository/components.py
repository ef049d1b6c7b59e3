"""The one table of what an ERNIE-Image repository holds: each component, its class and files, whether it is quantized.

The names and classes are those of ``diffusers.ErnieImagePipeline`` and of the ``model_index.json`` that
``baidu/ERNIE-Image`` publishes. No other module repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass

PIPELINE_CLASS = "ErnieImagePipeline"
MODEL_INDEX = "model_index.json"
METADATA = "quantization_metadata.json"

# ErnieImagePipeline works on 16-pixel patches: the VAE halves three times, the transformer's patches once more.
PIXELS_PER_PATCH = 16


@dataclass(frozen=True)
class Component:
    """One folder of the repository.

    Attributes:
        name: Folder and pipeline argument.
        library: ``"diffusers"`` or ``"transformers"``, the first entry of its ``model_index.json`` line.
        class_name: The class that loads it, the second entry.
        other_classes: Other classes that the second entry may name: no class is imported that isn't in this table.
        config: The file without which the folder is not this component.
        weights: The safetensors file, or None for a component without weights.
        quantized: Whether its linear layers are stored as NF4; everything else keeps its original precision.
        optional: Whether the pipeline runs without it.
        streamed: Whether it is large and made of blocks that can come to a GPU one by one.
        unused: Modules whose weights text-to-image doesn't need on the GPU: what it never calls, and a table that it
            takes few rows of.
    """

    name: str
    library: str
    class_name: str
    config: str
    weights: str | None = None
    quantized: bool = False
    optional: bool = False
    streamed: bool = False
    unused: tuple[str, ...] = ()
    other_classes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes that may load it."""
        return (self.class_name, *self.other_classes)


# The tokenizers of Mistral's text models, by their names in transformers 5 and in earlier releases.
TOKENIZER = "TokenizersBackend"
OTHER_TOKENIZERS = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer")

COMPONENTS: tuple[Component, ...] = (
    Component(
        "transformer",
        "diffusers",
        "ErnieImageTransformer2DModel",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        quantized=True,
        streamed=True,
    ),
    Component(
        "text_encoder",
        "transformers",
        "Mistral3Model",
        "config.json",
        "model.safetensors",
        quantized=True,
        unused=("vision_tower", "multi_modal_projector", "embed_tokens"),
    ),
    Component(
        "pe", "transformers", "Ministral3ForCausalLM", "config.json", "model.safetensors", quantized=True, optional=True
    ),
    Component("vae", "diffusers", "AutoencoderKLFlux2", "config.json", "diffusion_pytorch_model.safetensors"),
    Component("scheduler", "diffusers", "FlowMatchEulerDiscreteScheduler", "scheduler_config.json"),
    Component("tokenizer", "transformers", TOKENIZER, "tokenizer_config.json", other_classes=OTHER_TOKENIZERS),
    Component(
        "pe_tokenizer",
        "transformers",
        TOKENIZER,
        "tokenizer_config.json",
        optional=True,
        other_classes=OTHER_TOKENIZERS,
    ),
)

COMPONENT: dict[str, Component] = {component.name: component for component in COMPONENTS}
QUANTIZED: tuple[Component, ...] = tuple(component for component in COMPONENTS if component.quantized)
PROMPT_ENHANCER: tuple[str, ...] = tuple(component.name for component in COMPONENTS if component.optional)
