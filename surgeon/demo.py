"""A base model and two texts made from what every Python has, so that the demo needs no network.

The base learns the standard library's sources; the text it is adapted to is the language reference that `pydoc` carries
(`pydoc_data.topics`): prose about the same language, which the base has never seen.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH = 1024, 128, 8
PIECE = 900  # characters in a row of the adaptation text


def source_texts(limit: int = 2_000_000) -> list[str]:
    """Sources of the standard library, up to `limit` characters, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = (
        "test",
        "tests",
        "site-packages",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "__pycache__",
        "turtledemo",
        "encodings",
    )
    files = [path for path in sorted(root.rglob("*.py")) if not set(path.relative_to(root).parts) & set(skipped)]
    random.Random(0).shuffle(files)
    texts, size = [], 0
    for path in files:
        text = path.read_text(errors="ignore")
        texts.append(text)
        size += len(text)
        if size > limit:
            break
    return texts


def reference_rows() -> tuple[list[str], list[str]]:
    """Pieces of the language reference: what to adapt to, and what is held out, split by topic."""
    from pydoc_data.topics import topics

    train: list[str] = []
    held_out: list[str] = []
    for number, name in enumerate(sorted(topics)):
        text = topics[name]
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE) if len(text[at : at + PIECE]) > 200]
        (held_out if number % 8 == 0 else train).extend(pieces)
    random.Random(0).shuffle(train)
    return train, held_out[:48]


def write_rows(rows: list[str], path: Path) -> Path:
    """One `{"text": …}` a line."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_config() -> LlamaConfig:
    """A Llama of 0.9 million parameters with grouped-query attention and tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def train_base(folder: Path, seconds: float, report: Callable[[float, int, float], None]) -> float:
    """Train the base for this long, write it to `folder`, and return its last loss in nats per token.

    Args:
        folder: a new folder.
        seconds: of training; the learning rate falls to 0 over them (cosine).
        report: called with (share of the time, step, loss).
    """
    texts = source_texts()
    tokenizer = make_tokenizer(texts)
    stream = torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], 2]])
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began, smooth = time.monotonic(), math.log(VOCABULARY)
    for step, batch in enumerate(_batches(stream)):
        share = (time.monotonic() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * share))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth += 0.05 * (loss.item() - smooth)
        report(share, step, smooth)
    transformers.utils.logging.disable_progress_bar()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return smooth


def _batches(stream: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
