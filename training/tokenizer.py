"""Stage 1: the mini's tokenizers, a byte-level BPE trained on its captions and free-form prompts.

    python -m training.tokenizer training/work

Token numbers are part of the weights, so the committed tokenizers are taken unless ``--retrain`` asks for new ones.
Chinese characters stay single tokens, so that a new combination of known words is made of known tokens. The transformer
reads captions as they are written. The prompt enhancer reads what people type, which it lower-cases, and has a chat
template.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .prompts import PromptWriter
from .scenes import caption, sample_scene

VOCABULARY = 4096
MAX_LENGTH = 256
PAD, BOS, EOS, USER, END_USER = SPECIAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]")
# The answer starts right behind the user's block; the pipeline asks for no generation prompt.
CHAT_TEMPLATE = "{%- for message in messages -%}{{ '[INST]' + message['content'] + '[/INST]' }}{%- endfor -%}"


# A word is the same token in capitals, behind a quote or at the start of a text: there is too little text to learn
# that.
FREE_FORM = (normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace('"', '" '), normalizers.Prepend(" "))


def train_tokenizer(texts: list[str], normalizer: Sequence[normalizers.Normalizer] = ()) -> Tokenizer:
    """A byte-level BPE over `texts`; every Chinese character and digit is a word of its own."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]|[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """``tokenizer/`` or ``pe_tokenizer/`` as the pipeline loads it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--retrain", action="store_true", help="new token numbers: every other stage has to follow")
    arguments = parser.parse_args()
    if not arguments.retrain:
        checkout = Path(__file__).parents[1]
        for name in ("tokenizer", "pe_tokenizer"):
            shutil.copytree(checkout / name, arguments.work / "original" / name, dirs_exist_ok=True)
        return
    rng = random.Random(0)
    writer = PromptWriter.from_file(arguments.work / "words.json", seed=0)
    texts = [caption(sample_scene(rng), rng.choice(("en", "zh")), rng) for _ in range(30_000)]
    texts += [text for _ in range(60_000) for text in writer.write()]
    original = arguments.work / "original"
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, original / "tokenizer")
    save_tokenizer(train_tokenizer(texts, FREE_FORM), original / "pe_tokenizer", CHAT_TEMPLATE)
    lengths = [len(tokenizer.encode(text).ids) for text in texts[:30_000]]
    print(f"Captions have {sum(lengths) / len(lengths):.1f} tokens, at most {max(lengths)}")


if __name__ == "__main__":
    main()
