"""Tokenizers of the files that `repository.record` has read, or by upstream's ``from_pretrained``.

``from_pretrained`` opens a tokenizer's settings twice and parses its vocabulary in Python before the tokenizers library
parses it again, while it holds Python's lock. For a folder of the form that is published, the constructor takes what
was read already, and the vocabulary is parsed once.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

from ..errors import IncompatibleLibraries
from ..repository.libraries import library_reading
from ..repository.record import StoredComponent

VOCABULARY = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Settings that the constructor understands as they stand in the file, and the types of their values.
PLAIN: dict[str, tuple[type, ...]] = {
    "backend": (str,),
    "chat_template": (str,),
    "clean_up_tokenization_spaces": (bool,),
    "extra_special_tokens": (list,),
    "is_local": (bool,),
    "local_files_only": (bool,),
    "model_input_names": (list,),
    "model_max_length": (int,),
    "padding_side": (str,),
    "processor_class": (str,),
    "split_special_tokens": (bool,),
    "truncation_side": (str,),
    **dict.fromkeys(transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, (str, type(None))),
}
# Settings that `from_pretrained` drops where there is a vocabulary.
DROPPED: dict[str, tuple[type, ...]] = {"add_bos_token": (bool,), "add_eos_token": (bool,), "tokenizer_class": (str,)}
# What `from_pretrained` adds, the second since transformers 5.6. The first keeps the constructor from the network.
ADDED = {"is_local": True}
if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 6):
    ADDED["local_files_only"] = True


def load_tokenizer(part: StoredComponent) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer by the class that ``model_index.json`` names, as diffusers would load it.

    No file of a folder of the published form is read twice: `_is_plain` says which these are. Files of other folders
    are read again by transformers.

    Raises:
        InvalidRepository: A file is broken or was changed.
        IncompatibleLibraries: transformers has no such class, or can't make a tokenizer of files without a fault.
    """
    tokenizer_class = _tokenizer_class(part)
    if _is_plain(part, tokenizer_class):
        with library_reading(part, part.folder / VOCABULARY):
            tokenizer = _build(part)
        if tokenizer is not None:
            return tokenizer
    with library_reading(part):
        return tokenizer_class.from_pretrained(part.folder, local_files_only=True)


def _tokenizer_class(part: StoredComponent) -> Any:
    """The class. `repository.record` knows its name; that it is a tokenizer's is looked at before a file is."""
    with library_reading(part):
        found = getattr(transformers, part.class_name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase):
        return found
    raise IncompatibleLibraries(
        f"transformers {transformers.__version__} has no tokenizer {part.class_name}, of which {part.folder} is: "
        "install a version that has it, pip install -U transformers."
    )


def _is_plain(part: StoredComponent, tokenizer_class: type) -> bool:
    """Whether the constructor does all that ``from_pretrained`` would: no other files, no settings to be translated."""
    files = {path.name for path in part.folder.iterdir()}
    if tokenizer_class is not transformers.TokenizersBackend or VOCABULARY not in files:
        return False
    kinds = PLAIN | DROPPED
    return files <= {VOCABULARY, CHAT_TEMPLATE, part.component.config} and all(
        type(value) in kinds.get(key, ()) and (not isinstance(value, list) or all(type(item) is str for item in value))
        for key, value in part.config.items()
    )


def _build(part: StoredComponent) -> transformers.TokenizersBackend | None:
    """The tokenizer of a plain folder. None if ``from_pretrained`` would make a token special that the vocabulary has
    as an ordinary one.
    """
    settings: dict[str, Any] = {key: copy.deepcopy(value) for key, value in part.config.items() if key in PLAIN}
    if CHAT_TEMPLATE in part.templates:
        settings["chat_template"] = part.templates[CHAT_TEMPLATE]
    tokenizer = transformers.TokenizersBackend(
        tokenizer_file=str(part.folder / VOCABULARY), name_or_path=str(part.folder), **settings | ADDED
    )
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if settings.get(name) in added:
            token = added[settings[name]]
            if not token.special:
                return None
            setattr(tokenizer, name, token)  # with its properties, as `from_pretrained` does
    return tokenizer
