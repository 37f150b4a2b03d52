"""A tiny encoder with a word-piece tokenizer on disk, without a head: what classifiers begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel, BertTokenizer

from benchmarks.zoo.build import randomise

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = tuple(
    word
    for line in (
        "the a was is in of and who what where when how tall",
        "film tower sun ant house river big small long good great lovely bad dull awful",
        "john mary paris london lives born built capital france ? . ,",
    )
    for word in line.split()
)
PIECES = ("##s", "##ly", "##er", "##ville", "##don", *(f"##{n}" for n in range(10)))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def save_encoder(folder: Path, positions: int = 64, **options: Any) -> Path:
    """Write a random BERT encoder and its tokenizer; digits are words and pieces of their own."""
    vocabulary = [*SPECIAL, *WORDS, *(str(n) for n in range(10)), *PIECES]
    model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=positions, **(SIZES | options)))
    randomise(model, seed=1)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=positions).save_pretrained(folder)
    return folder
