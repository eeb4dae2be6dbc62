"""What a front door must know of the model that it serves. No weights, no torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.frontdoor.template import ChatTemplate
from cluster.frontdoor.tokenizer import Tokenizer
from workers.errors import CheckpointError
from workers.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model: its name, its text side, and what unset request fields mean.

    `context_tokens` counts prompt and completion together; `vocab_size` counts the rows of the
    embedding, of which the tokenizer may leave some unused.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def load(cls, directory: str | Path, *, name: str = "", context_tokens: int = 0) -> "ModelInfo":
        """Read a model directory; 0 context tokens take the model's own bound.

        Raises:
            CheckpointError: A file is missing or damaged, or a key that is needed is not there.
        """
        path = Path(directory)
        config = _read_json(path / "config.json")
        text = config.get("text_config", config)
        generation = _read_json(path / "generation_config.json", missing={})
        tokenizer_config = _read_json(path / "tokenizer_config.json", missing={})
        try:
            longest, vocab_size = int(text["max_position_embeddings"]), int(text["vocab_size"])
        except KeyError as error:
            raise CheckpointError(f"{path / 'config.json'} has no {error}") from error
        eos = generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
        return cls(
            name=name or path.resolve().name,
            tokenizer=Tokenizer.load(path / "tokenizer.json"),
            template=_template(path, tokenizer_config),
            context_tokens=min(context_tokens or longest, longest),
            vocab_size=vocab_size,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            sampling=_sampling(generation),
        )


def _sampling(generation: dict[str, Any]) -> Sampling:
    """Return the checkpoint's recommended sampling; greedy where it says not to sample."""
    default = Sampling()

    def number(key: str, otherwise: float) -> float:
        value = generation.get(key)
        return otherwise if value is None else float(value)

    sampled = generation.get("do_sample") is not False
    return Sampling(
        temperature=number("temperature", default.temperature) if sampled else 0.0,
        top_p=number("top_p", default.top_p),
        top_k=int(number("top_k", default.top_k)),
        min_p=number("min_p", default.min_p),
        presence_penalty=number("presence_penalty", default.presence_penalty),
        frequency_penalty=number("frequency_penalty", default.frequency_penalty),
        repetition_penalty=number("repetition_penalty", default.repetition_penalty),
    )


def _template(path: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    """Return the chat template, from its own file or from the tokenizer's settings."""
    file = path / "chat_template.jinja"
    source = file.read_text("utf-8") if file.exists() else tokenizer_config.get("chat_template")
    if not isinstance(source, str):
        return None
    special_tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tokenizer_config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special_tokens[key] = token
    return ChatTemplate(source, special_tokens)


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
