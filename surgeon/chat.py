"""Text in, text out: prompts continued, and conversations in the tokenizer's own chat template."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TextStreamer

from surgeon.errors import UsageError
from surgeon.generate import generator
from surgeon.graph import Graph
from surgeon.module import GraphModule


def complete(loaded: GraphModule, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """The continuation of each prompt, generated together; `options` are those of `generate`.

    Raises:
        UsageError: there is no tokenizer, or a prompt has no token.
    """
    tokenizer = _for_generation(tokenizer, loaded.graph)
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    if encoded["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty", "--prompt", "give it some text")
    start = 0 if loaded.graph.task == "seq2seq-lm" else encoded["input_ids"].shape[1]
    model = generator(loaded)
    given = {name: value.to(model.device) for name, value in encoded.items() if name in ("input_ids", "attention_mask")}
    made = model.generate(**given, tokenizer=tokenizer, **{"pad_token_id": tokenizer.pad_token_id, **options})
    texts: list[str] = tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)
    return texts


def _for_generation(tokenizer: Any, graph: Graph) -> Any:
    """The tokenizer with a pad token: its own, or the end of text, which a mask hides anyway."""
    if tokenizer is None:
        where = graph.source or graph.config.model_type
        raise UsageError("there is no tokenizer", where, "put tokenizer.json beside it")
    if tokenizer.pad_token_id is not None:
        return tokenizer
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token if padded.eos_token is not None else padded.convert_ids_to_tokens(0)
    return padded


class _Pieces(TextStreamer):
    """Hands each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer when no later token can change `text`."""
        self.write(text)


class Chat:
    """One conversation.

    Attributes:
        messages: what was said, as `{"role": …, "content": …}`.
    """

    def __init__(self, loaded: GraphModule, tokenizer: Any, *, system: str = "", **options: Any) -> None:
        """Start it.

        Args:
            loaded: a module whose graph generates.
            tokenizer: its tokenizer.
            system: the system message, "" for none.
            options: of `generate`.

        Raises:
            UsageError: the tokenizer has no chat template.
        """
        where = loaded.graph.source or str(loaded.graph.config.model_type)
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            hint = "use an instruction-tuned model, or surgeon generate for plain text"
            raise UsageError("the tokenizer has no chat template", where, hint)
        self.model, self.tokenizer, self.options, self.where = generator(loaded), tokenizer, options, where
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self.opening)

    def say(self, text: str, write: Callable[[str], None] = lambda piece: None) -> str:
        """Say something and return the answer, which `write` gets piece by piece while it is made.

        An answer that is interrupted (Ctrl-C) is not remembered, nor is what it answers.

        Raises:
            UsageError: the template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encoded(messages)
        ids = prompt["input_ids"]
        made = self.model.generate(
            **prompt,
            streamer=_Pieces(self.tokenizer, write),
            **{"pad_token_id": self._padding(), "tokenizer": self.tokenizer, **self.options},
        )
        new = made[0] if self.model.config.is_encoder_decoder else made[0, ids.shape[1] :]
        answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _encoded(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates raise whatever jinja and their authors raise
            reason = f"the chat template refuses the conversation: {error}".splitlines()[0]
            raise UsageError(reason, self.where, "some templates know no system message") from error
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _padding(self) -> int | None:
        pad: int | None = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


def chat_turns(chat: Chat, read: Callable[[], str], write: Callable[[str], None]) -> int:
    """Answer what `read` gives until it raises EOFError or says `/exit`; returns how often. `/reset` starts anew."""
    answers = 0
    while True:
        try:
            text = read().strip()
        except EOFError:
            return answers
        if text in ("/exit", "/quit"):
            return answers
        if text == "/reset":
            chat.reset()
        elif text:
            try:
                chat.say(text, write)
                answers += 1
            except KeyboardInterrupt:
                write("\n[interrupted; not remembered]")
            write("\n")
