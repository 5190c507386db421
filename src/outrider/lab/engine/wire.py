"""OpenAI's JSON in and out: bodies to prompts and Params, outputs to completions, chunks and usage. No state.

What this engine lacks is refused by name (400), never ignored silently, unless ignoring it cannot change the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from outrider.errors import CallerError
from outrider.lab.engine.request import Params, Request

NEUTRAL: dict[str, tuple[Any, ...]] = {  # field: the values with which it asks for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
}


def chat_prompt(body: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of `messages` under the model's chat template, the answer's beginning included."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise CallerError("messages: give a list of at least one message.")
    if not tokenizer.chat_template:
        raise CallerError("This model has no chat template; use /v1/completions.")
    plain = [{**one, "content": content(one)} for one in messages if isinstance(one, dict) and "role" in one]
    if len(plain) < len(messages):
        raise CallerError("messages: each one needs a role and a content.")
    try:
        text = tokenizer.apply_chat_template(
            plain, tools=body.get("tools") or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # the template is the model's code: it raises what it likes
        raise CallerError(f"messages: the model's chat template refuses them ({error}).") from error
    return encoded(tokenizer, text, add_special_tokens=False)


def content(message: Mapping[str, Any]) -> str:
    """A message's text; parts are joined, None (an assistant that only called tools) is empty."""
    value = message.get("content")
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    if value is None or isinstance(value, str):
        return value or ""
    raise CallerError("messages: content must be text or a list of text parts; this engine sees no images or audio.")


def text_prompt(body: Mapping[str, Any], tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids of `prompt`: a string, or token ids as they are."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return encoded(tokenizer, prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if all(0 <= token < vocabulary for token in prompt):
            return prompt
        raise CallerError(f"prompt: token ids lie in [0, {vocabulary}).")
    raise CallerError("prompt: give one string or one list of token ids.")


def encoded(tokenizer: Any, text: str, **how: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CallerError("The text holds half of a surrogate pair, which is no character.") from error
    return list(tokenizer.encode(text, **how))


def params(
    body: Mapping[str, Any], prompt_tokens: int, context: int, vocabulary: int, default_tokens: int | None
) -> Params:
    """Generation parameters, checked. `context` = tokens that one request may have; None = as many as fit."""
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise CallerError(f"{name}: this engine has only {name}={neutral[0]!r}.")
    room = context - prompt_tokens
    if prompt_tokens < 1:
        raise CallerError("The prompt is empty; give at least one token.")
    asked = number(body, "max_completion_tokens", int, 1) or number(body, "max_tokens", int, 1)
    if room < 1 or (asked or 0) > room:
        raise CallerError(
            f"{prompt_tokens} prompt tokens and max_tokens={asked or 1} do not fit: this engine holds {context} tokens "
            "a request (the smaller of model context and --kv-tokens). Shorten the prompt or lower max_tokens."
        )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop) or len(stop) > 16:
        raise CallerError("stop: give a string or a list of at most 16 strings.")
    stop_ids = body.get("stop_token_ids") or []
    if not isinstance(stop_ids, list) or not all(type(token) is int and 0 <= token < vocabulary for token in stop_ids):
        raise CallerError(f"stop_token_ids: give a list of token ids in [0, {vocabulary}).")
    seed = number(body, "seed", int, 0)
    if seed is not None and seed >= 1 << 63:
        raise CallerError("seed: give an integer below 2**63.")
    temperature = number(body, "temperature", float, 0)
    top_p = number(body, "top_p", float, 0)
    if top_p is not None and not 0 < top_p <= 1:
        raise CallerError("top_p: give a number in (0, 1].")
    return Params(
        max_tokens=asked or min(default_tokens or room, room),
        min_tokens=number(body, "min_tokens", int, 0) or 0,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
        stop=tuple(stop),
        stop_token_ids=tuple(stop_ids),
        ignore_eos=bool(body.get("ignore_eos")),
        return_routes=bool(body.get("return_routed_experts")),
    )


def number(body: Mapping[str, Any], name: str, kind: type, least: float) -> Any:
    """The field as a number, None if absent. CallerError if it is something else or too small."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not value >= least:
        raise CallerError(f"{name}: give {'an integer' if kind is int else 'a number'} of at least {least}.")
    return value


class Reply:
    """Shapes of one answer. `chat`: a chat completion, else a text completion."""

    def __init__(self, request: Request, model: str, chat: bool, created_s: int, block_tokens: int, ids: bool) -> None:
        self.request, self.chat, self.block_tokens, self.ids = request, chat, block_tokens, ids
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{request.id}", "created": created_s, "model": model}

    def whole(self, text: str, finish: str, routes: Any) -> dict[str, Any]:
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "finish_reason": finish, "logprobs": None, **self.extras(routes)}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self.usage()}

    def chunk(self, text: str, finish: str | None, first: bool, routes: Any) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        body = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        extras = self.extras(routes) if finish else {}
        choice = {"index": 0, **body, "finish_reason": finish, "logprobs": None, **extras}
        return {**self.head, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    @property
    def chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def usage(self) -> dict[str, Any]:
        """cached_tokens: not computed for this request (own cache and memory); external_tokens: of them from memory."""
        prompt, generated = len(self.request.prompt), len(self.request.generated)
        external = self.request.external_blocks * self.block_tokens
        cached = self.request.own_blocks * self.block_tokens + external
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached, "external_tokens": external},
        }

    def extras(self, routes: Any) -> dict[str, Any]:
        """vLLM's names. Every generated token has its row: the last one passes the model once more for it."""
        prompt = len(self.request.prompt)
        ids: dict[str, Sequence[int]] = {}
        if self.ids:
            ids = {"prompt_token_ids": self.request.prompt, "token_ids": self.request.generated}
        if routes is None:
            return ids
        return {**ids, "prompt_routed_experts": routes[:prompt].tolist(), "routed_experts": routes[prompt:].tolist()}


def failure(message: str, code: int) -> dict[str, Any]:
    kind = "invalid_request_error" if code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
