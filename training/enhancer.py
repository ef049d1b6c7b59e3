"""Stage 4: train the prompt enhancer to turn free-form prompts into captions.

    python -m training.enhancer training/work --steps 7000

Examples are written by ``prompts.PromptWriter``, in the form in which ``ErnieImagePipeline`` asks: chat template,
JSON message, answer, end token. Only the answer counts for the loss.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Ministral3ForCausalLM, PreTrainedTokenizerFast

from .models import Ema, build_enhancer, learning_rate_factor
from .prompts import PromptWriter

BATCH, LENGTH, ANSWER = 256, 256, 40
DROPOUT = 0.1  # of BPE merges in the question of every third example, so that unusual spellings are known too
EXAMPLES = 560_000


def encode_examples(work: Path, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` examples: token ids (count, LENGTH) int16, padded, and where each answer begins (count)."""
    tokenizer = AutoTokenizer.from_pretrained(work / "original" / "pe_tokenizer")
    writer = PromptWriter.from_file(work / "words.json", seed)
    ids = torch.full((count, LENGTH), tokenizer.pad_token_id, dtype=torch.int16)
    starts = torch.zeros(count, dtype=torch.int16)
    model = tokenizer.backend_tokenizer.model
    row = 0
    while row < count:
        message, caption = writer.write()
        model.dropout = DROPOUT if row % 3 == 0 else None
        question = question_ids(tokenizer, message)
        model.dropout = None
        answer = [*answer_ids(tokenizer, caption), tokenizer.eos_token_id]
        if len(question) + len(answer) > LENGTH or len(answer) > ANSWER:
            continue
        ids[row, : len(question) + len(answer)] = torch.tensor(question + answer, dtype=torch.int16)
        starts[row] = len(question)
        row += 1
    return ids, starts


def question_ids(tokenizer: PreTrainedTokenizerFast, message: str) -> list[int]:
    """Token ids of the user's message, exactly as ``ErnieImagePipeline._enhance_prompt_with_pe`` makes them."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=False
    )
    return tokenizer(text)["input_ids"]


def answer_ids(tokenizer: PreTrainedTokenizerFast, caption: str) -> list[int]:
    """Token ids that decode to exactly `caption`: without the lower-casing of what is read."""
    backend = tokenizer.backend_tokenizer
    normalizer, backend.normalizer = backend.normalizer, None
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    backend.normalizer = normalizer
    return ids


def train(enhancer: Ministral3ForCausalLM, ids: torch.Tensor, starts: torch.Tensor, steps: int) -> None:
    """Train in place on `ids` and `starts` (on the GPU); the averaged weights are left in `enhancer`."""
    optimizer = torch.optim.AdamW(enhancer.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, 300))
    ema = Ema(enhancer, decay=0.998)
    offsets = torch.arange(ANSWER, device=ids.device)

    @torch.compile(dynamic=False)
    def loss_of(tokens: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = enhancer.model(input_ids=tokens, use_cache=False).last_hidden_state
            # The answer's tokens are predicted at the positions just before them.
            positions = (begins[:, None] + offsets - 1).clamp(max=LENGTH - 2)
            picked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
            logits = enhancer.lm_head(picked)
        targets = tokens.gather(1, positions + 1)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=0)

    started = time.time()
    generator = torch.Generator(ids.device).manual_seed(5)
    for step in range(steps):
        rows = torch.randint(len(ids), (BATCH,), device=ids.device, generator=generator)
        loss = loss_of(ids[rows].long(), starts[rows].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(enhancer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        if step % 500 == 0 or step == steps - 1:
            print(f"enhancer step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
    ema.swap()


@torch.no_grad()
def greedy_accuracy(enhancer: Ministral3ForCausalLM, ids: torch.Tensor, starts: torch.Tensor) -> float:
    """Fraction of new examples whose objects (all up to the last comma) come out right, teacher-forced."""
    right = total = 0
    for tokens, begins in zip(ids.long().split(256), starts.long().split(256), strict=True):
        guess = enhancer(input_ids=tokens, use_cache=False).logits.argmax(-1)[:, :-1]
        index = torch.arange(LENGTH - 1, device=tokens.device)
        # The first six answer tokens name the objects; the background may be free to choose.
        part = (index >= begins[:, None] - 1) & (index < begins[:, None] + 5) & (tokens[:, 1:] != 0)
        right += ((guess == tokens[:, 1:]) | ~part).all(1).sum().item()
        total += len(tokens)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    share = arguments.examples // arguments.processes
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        jobs = [(arguments.work, seed, share) for seed in range(100, 100 + arguments.processes)]
        parts = pool.starmap(encode_examples, jobs)
    ids = torch.cat([part[0] for part in parts]).cuda()
    starts = torch.cat([part[1] for part in parts]).cuda()
    print(f"enhancer: {len(ids)} examples", flush=True)
    enhancer = build_enhancer().cuda()
    train(enhancer, ids, starts, arguments.steps)
    enhancer = enhancer.to(torch.bfloat16).eval()
    enhancer.generation_config.pad_token_id = 0
    enhancer.save_pretrained(arguments.work / "original" / "pe")
    new_ids, new_starts = encode_examples(arguments.work, seed=99, count=2048)
    print(
        f"enhancer: {greedy_accuracy(enhancer, new_ids.cuda(), new_starts.cuda()):.3f} of new examples begin right",
        flush=True,
    )


if __name__ == "__main__":
    main()
