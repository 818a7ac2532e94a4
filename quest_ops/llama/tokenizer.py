"""Tokenizer: text to token ids and back, streaming, and chat templates, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
from datetime import datetime
from functools import partial
from pathlib import Path

LLAMA_EXTRA = 'pip install "quest_ops[llama]"'

# Splitting regexes by llama.cpp's name of the pre-tokenizer; all are followed by the byte-level alphabet.
# None: GPT-2's own regex, which tokenizers has built in.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's special tokens and chat template.

    eos_token_ids: tuple of the ids that end an answer. bos_token_id: int or None. vocab_size: number of tokens.
    """

    def __init__(self, backend, *, eos_token_ids=(), bos_token_id=None, chat_template=None):
        self.backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of text. Special tokens written out in the text become their one id.

        add_special: also what the model's tokenizer puts around a text (for many a BOS token, for some nothing).
        The text of chat() already holds it: encode that with add_special=False."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds what was no UTF-8 (lone surrogates): {error}") from error
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. skip_special leaves special tokens out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special)

    def chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The model's chat template filled with messages, dicts with "role" and "content".

        add_generation_prompt: end where the assistant's answer begins. Raises ValueError where the model has no
        template or the template refuses the messages."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template: write the prompt yourself and use encode()")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or "role" not in message or "content" not in message:
                raise ValueError(f"messages[{i}] must be a dict with 'role' and 'content', got {message!r}")
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(f"chat templates need jinja2: {LLAMA_EXTRA}") from error

        def raise_exception(message):
            raise TemplateError(message)

        # The environment that Hugging Face templates are written for.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._text_of(self.bos_token_id),
                eos_token=self._text_of(self.eos_token_ids[0] if self.eos_token_ids else None),
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refused the messages: {error}") from error

    def _text_of(self, token_id: int | None) -> str:
        text = None if token_id is None else self.backend.id_to_token(token_id)
        return text or ""

    @classmethod
    def from_folder(cls, path) -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json, chat_template.jinja, generation_config.json and config.json
        where they are there. eos ids: generation_config.json's, else config.json's, else the tokenizer's own.

        Raises FileNotFoundError without a tokenizer.json, ValueError for files that cannot be read."""
        tokenizers = _import_tokenizers()
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json (a tokenizer.model alone is not supported: save it once with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file} is not a tokenizer that `tokenizers` can read: {error}") from error

        settings = read_json(folder / "tokenizer_config.json", missing={})

        def id_of(key):
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{folder / 'tokenizer_config.json'}: {key} must be a text, got {token!r}")
            return None if token is None else backend.token_to_id(token)

        eos = None
        for name in ("generation_config.json", "config.json"):
            if eos is None:
                eos = read_json(folder / name, missing={}).get("eos_token_id")
        if eos is None:
            eos = id_of("eos_token")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(token, int) for token in eos):
            raise ValueError(f"{folder}: eos_token_id must be one or more token ids (int), got {eos!r}")
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text, got {template!r}")
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        return cls(
            backend,
            eos_token_ids=eos,
            bos_token_id=id_of("bos_token"),
            chat_template=template,
        )

    @classmethod
    def from_gguf(cls, reader) -> Tokenizer:
        """Builds the tokenizer from a `gguf.GGUFReader`'s metadata.

        tokenizer.ggml.model "gpt2" (byte-level BPE; pre-tokenizers smollm, llama-bpe, qwen2, gpt-2) and "llama"
        (SentencePiece BPE). Raises ValueError that names any other."""
        tokenizers = _import_tokenizers()

        def value(key, default=None):
            field = reader.get_field(f"tokenizer.ggml.{key}")
            return default if field is None else field.contents()

        model = value("model")
        tokens = value("tokens")
        if tokens is None:
            raise ValueError("the GGUF file holds no tokenizer (no tokenizer.ggml.tokens)")
        types = value("token_type", [_NORMAL] * len(tokens))
        if len(types) != len(tokens):
            raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        if model == "gpt2":
            pre = value("pre")
            if pre not in _SPLITS:
                raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(_SPLITS)}")
            if value("merges") is None:
                raise ValueError("the GGUF file's gpt2 tokenizer has no tokenizer.ggml.merges")
            build = partial(_byte_level_bpe, tokens, value("merges"), pre)
        elif model == "llama":
            if value("scores") is None or len(value("scores")) != len(tokens):
                raise ValueError("the GGUF file's llama tokenizer lacks tokenizer.ggml.scores for its tokens")
            build = partial(
                _sentencepiece_bpe,
                tokens,
                value("scores"),
                types,
                value("unknown_token_id", 0),
                value("add_space_prefix", True),
            )
        else:
            raise ValueError(f"tokenizer.ggml.model {model!r} is not supported; supported: gpt2, llama")
        try:
            backend = build()
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"the GGUF file's tokenizer is damaged: {error}") from error

        def added(wanted, special):
            return [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types)
                if kind == wanted
            ]

        backend.add_special_tokens(added(_CONTROL, True) + added(_UNKNOWN, True))
        backend.add_tokens(added(_USER_DEFINED, False))

        bos = value("bos_token_id")
        # llama.cpp's defaults where the file does not say.
        if value("add_bos_token", model == "llama" or value("pre") == "llama-bpe"):
            if bos is None:
                raise ValueError("the GGUF file asks for a BOS token and has no tokenizer.ggml.bos_token_id")
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
        ends = [value(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        template = reader.get_field("tokenizer.chat_template")
        return cls(
            backend,
            eos_token_ids=dict.fromkeys(end for end in ends if end is not None),
            bos_token_id=bos,
            chat_template=None if template is None else template.contents(),
        )


class StreamDecoder:
    """Turns ids into text one at a time, never splitting a character.

    The texts of all step() calls and of the closing flush() join to decode() of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._ids: list[int] = []  # the last ids written out, then those held back
        self._written = 0

    def step(self, token_id: int) -> str:
        """The text that this id completes: "" while a character is unfinished."""
        self._ids.append(int(token_id))
        text = self._pending()
        # U+FFFD at the end is most likely a character whose last bytes are still to come.
        if not text or text.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._written :]
        self._written = len(self._ids)
        return text

    def flush(self) -> str:
        """What is still held back: bytes that never became a character, as U+FFFD."""
        text = self._pending()
        self._ids, self._written = [], 0
        return text

    def _pending(self) -> str:
        # Decoded together with the ids before them, since a decoder may strip a text's first space.
        before = self._decode(self._ids[: self._written])
        return self._decode(self._ids)[len(before) :]


def read_json(file: Path, missing=None) -> dict:
    """The object in a JSON file; `missing`, when given, where there is no such file."""
    if missing is not None and not file.is_file():
        return missing
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors both
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            # Llama 3 keeps a piece that is a token whole, even where its merges would not lead there.
            ignore_merges=pre == "llama-bpe",
        )
    )
    split = _SPLITS[pre]
    steps = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(tokens: list[str], scores: list[float], types: list[int], unknown_id: int, space_prefix: bool):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece joins the neighbours whose union has the best score: so every way to write a token as two
    # tokens is a merge, ranked by the token's score.
    mergeable = {token for token, kind in zip(tokens, types) if kind == _NORMAL}
    merges = []
    for token in mergeable:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        score = scores[vocab[token]]
        merges += [(-score, vocab[a], vocab[b], a, b) for a, b in splits if a in mergeable and b in mergeable]
    merges.sort()
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for *_, a, b in merges],
            unk_token=tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _import_tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"tokenizers is needed to read a model's tokenizer: {LLAMA_EXTRA}") from error
    return tokenizers
