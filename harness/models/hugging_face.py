"""`hf:PATH`: a text model from a local folder, as Hugging Face's `transformers` saves it. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.models.tokens import EXTRA, MissingExtra, Tokens

HEADS = {
    "MaskedLM": "AutoModelForMaskedLM",
    "SequenceClassification": "AutoModelForSequenceClassification",
    "LMHeadModel": "AutoModelForCausalLM",
    "CausalLM": "AutoModelForCausalLM",
}
"""End of an architecture's name -> the class that loads it with its head."""


def load_folder(path: str) -> nn.Module:
    """The model whose `config.json` and weights lie in a folder; drawn weights where it holds none.

    Raises: MissingExtra; ValueError, naming the folder, and OSError.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: wanted a folder with a model's config.json")
    try:
        import transformers
    except ImportError:
        raise MissingExtra(f"hf:{path} needs the package transformers: {EXTRA}") from None
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    name = (config.architectures or [""])[0]
    builder = next((getattr(transformers, kind) for end, kind in HEADS.items() if name.endswith(end)), None)
    if builder is None:
        ends = ", ".join(HEADS)
        raise ValueError(f"{folder}: architecture {name or 'not named'!r}; wanted one that ends in {ends}")
    if any(folder.glob("*.safetensors")):
        inner = builder.from_pretrained(folder, local_files_only=True, attn_implementation="eager", dtype="float32")
    else:
        inner = builder.from_config(config)
    return HuggingFace(inner, config)


class HuggingFace(nn.Module):
    """Takes tokens and gives logits, as the built-in text models do."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = model
        pad = config.pad_token_id if config.pad_token_id is not None else getattr(config, "eos_token_id", None)
        self.tokens = Tokens(vocab=config.vocab_size, pad=pad or 0)
        self.input_shape = (config.max_position_embeddings,)
        config.pad_token_id = self.tokens.pad  # a classifier that reads the last token looks for it

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """Logits, as `harness.models.bert` and `harness.models.gpt2` say."""
        mask = (tokens != self.tokens.pad).long()
        if words is None:
            return self.model(input_ids=tokens, attention_mask=mask).logits
        return self.model(inputs_embeds=words, attention_mask=mask).logits
