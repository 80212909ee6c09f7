"""Chat templates with the behaviours of public ones, and small tokenizers of the kinds that stand behind them."""

# ruff: noqa: E501  # a template is easier to read in one piece

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"
_GENERATE = "{% if add_generation_prompt %}"
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_SYSTEM_APART = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
)

TEMPLATES = {
    "plain turns": _LOOP + "<|a|>{{ m['role'] }}\n{{ m['content'] }}<|b|>\n" + _END + _GENERATE + "<|a|>assistant\n{% endif %}",
    "trims": _LOOP + "<|a|>{{ m['role'] }}<|b|>\n\n{{ m['content'] | trim }}<|c|>" + _END + _GENERATE + "<|a|>assistant<|b|>\n\n{% endif %}",
    "begins with a BOS": "{{ bos_token }}" + _LOOP + "<|a|>{{ m['role'] }}\n{{ m['content'] }}<|b|>\n" + _END,
    "a BOS for every user turn": _SYSTEM_APART
    + "{% for m in rest %}"
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.index0 == 0 and first %}{{ '<<S>>\n' + first + '\n<</S>>\n\n' }}{% endif %}"
    + "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    + _END,
    "system before the last user turn": _SYSTEM_APART
    + "{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}[INST] {% if loop.last and first %}{{ first + '\n\n' }}{% endif %}"
    + "{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    + _END,
    "refuses a system turn": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + _LOOP
    + _ALTERNATE
    + "<|a|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|b|>\n"
    + _END
    + _GENERATE
    + "<|a|>model\n{% endif %}",
    "refuses what is not user or assistant": "{{ bos_token }}"
    + _LOOP
    + "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    + "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    + _END,
    "folds the system turn": _SYSTEM_APART
    + "{{ bos_token }}{% for m in rest %}<|a|>{{ m['role'] }}\n{% if loop.first and first %}{{ first }}\n\n{% endif %}{{ m['content'] | trim }}<|b|>\n"
    + _END
    + _GENERATE
    + "<|a|>assistant\n{% endif %}",
    "has words of its own for no system turn": "{% if messages[0]['role'] != 'system' %}<|a|>system\nYou help.<|b|>\n{% endif %}"
    + _LOOP
    + "<|a|>{{ m['role'] }}\n{{ m['content'] }}<|b|>\n"
    + _END
    + _GENERATE
    + "<|a|>assistant\n{% endif %}",
    "drops earlier thoughts": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "<|a|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.index0 < ns.last and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    + "{% else %}{{ m['content'] }}{% endif %}<|b|>\n"
    + _END
    + _GENERATE
    + "<|a|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "opens a thought": "{{ bos_token }}" + _SYSTEM_APART + "{{ first }}{% for m in rest %}{% if m['role'] == 'user' %}<|a|>{{ m['content'] }}{% else %}<|b|>"
    + "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    + _END
    + _GENERATE
    + "<|b|><think>\n{% endif %}",
    "channels": "<|a|>system<|c|>Reasoning: {{ reasoning_effort | default('medium') }}<|b|>"
    + _LOOP
    + "{% if m['role'] == 'system' %}<|a|>developer<|c|># Instructions\n\n{{ m['content'] }}<|b|>"
    + "{% elif m['role'] == 'assistant' %}<|a|>assistant<|c|>final<|c|>{{ m['content'] }}<|b|>{% else %}<|a|>user<|c|>{{ m['content'] }}<|b|>{% endif %}"
    + _END
    + _GENERATE
    + "<|a|>assistant{% endif %}",
    "numbers turns": _LOOP + "[Round {{ loop.index }}]\n{{ m['role'] }}: {{ m['content'] }}\n" + _END + _GENERATE + "assistant:{% endif %}",
    "counts questions": "{% set ns = namespace(n=0) %}"
    + _LOOP
    + "{% if m['role'] == 'user' %}{% set ns.n = ns.n + 1 %}Question {{ ns.n }}: {{ m['content'] }}\n{% else %}{{ m['content'] }}\n{% endif %}"
    + _END,
    "a transcript without control tokens": _SYSTEM_APART
    + "{{ first }}{% for m in rest %}{% if m['role'] == 'user' %} USER: {{ m['content'] }}{% else %} ASSISTANT: {{ m['content'] }}</s>{% endif %}"
    + _END
    + _GENERATE
    + " ASSISTANT:{% endif %}",
    "names with colons": _LOOP + "{{ m['role'] | capitalize }}: {{ m['content'].strip() }}\n\n" + _END + _GENERATE + "Assistant: {% endif %}",
    "markers as plain text": _LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n" + _END + _GENERATE + "<|assistant|>\n{% endif %}",
    "markers that eat space": _LOOP + "<|strip|>\n{{ m['content'] }}<|b|>\n" + _END + _GENERATE + "<|strip|>\n{% endif %}",
    "hash headings": _SYSTEM_APART
    + "{{ first or 'Below is a request.' }}\n\n{% for m in rest %}### {{ 'Instruction' if m['role'] == 'user' else 'Response' }}:\n{{ m['content'] }}\n\n"
    + _END
    + "### Response:\n",
    "lower case": _LOOP + "<|a|>{{ m['content'] | lower }}<|b|>" + _END,
    "only the last question": "{{ bos_token }}{{ messages[-1]['content'] }}<|c|>",
    "all questions in one": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}\n{% endfor %}<|b|>",
    "twice": _LOOP + "<|a|>{{ m['content'] }}<|b|>{{ m['content'] }}<|c|>" + _END,
    "date and tools": "<|a|>system\nToday: {{ date_string | default('26 Jul 2024') }}\n{% if tools %}{{ tools | tojson }}\n{% endif %}<|b|>"
    + _LOOP
    + "<|a|>{{ m['role'] }}\n{{ m['content'] | trim }}<|b|>"
    + _END
    + _GENERATE
    + "<|a|>assistant\n\n{% endif %}",
    "reversed": "{% for m in messages[::-1] %}<|a|>{{ m['role'] }} {{ m['content'] }}<|b|>{% endfor %}",
    "content behind a quote": _LOOP + "{{ m['role'] }}=\"{{ m['content'] | replace('\"', \"'\") }}\";" + _END,
}  # fmt: skip
"""Behaviours, not texts, of: Llama 2, 3 and 3.1; Mistral v0.1, v0.3 and Small; Gemma 2 and 3; Qwen 2.5 and 3; Phi 3 and
4; SmolLM2 and 3; DeepSeek R1; gpt-oss; Command R; OLMo 2; Granite; Zephyr; ChatML; Vicuna; TinyLlama; Falcon 3; and a
few that nobody should write."""

_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "hello",
    "who",
    "and",
    "is",
    "what",
    "Be",
    "brief",
    "user",
    "assistant",
    "system",
    "model",
    "INST",
    "Question",
]
_CONTROL = ["<|a|>", "<|b|>", "<|c|>"]


def _merges(pieces: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges that spell each piece from its first character on."""
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            pair = (piece[: end - 1], piece[end - 1])
            vocabulary.setdefault(piece[:end], len(vocabulary))
            if pair not in merges:
                merges.append(pair)
    return merges


def _finish(core: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.add_special_tokens(
        {"extra_special_tokens": [*_CONTROL, AddedToken("<|strip|>", special=True, lstrip=True, rstrip=True)]}
    )
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return made


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, with Llama 3's way of splitting: line breaks stick to what is before them."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = _merges(["Ġ" + w for w in _WORDS] + _WORDS + ["ĊĊ", "?ĊĊ", "?Ċ", ".ĊĊ"], vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return _finish(core)


def _regex() -> object:
    from tokenizers import Regex

    return Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _byte_fallback(normalizer: object, pre_tokenizer: object) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁"]
    names += [chr(i) for i in range(33, 127)]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = _merges(["▁" + w for w in _WORDS] + _WORDS, vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(core)


def legacy_prefix() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space before every stretch between control tokens; bytes for what is unknown."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _byte_fallback(normalizer, None)


def first_prefix() -> PreTrainedTokenizerFast:
    """Mistral's and TinyLlama's kind: a space before the whole text only."""
    return _byte_fallback(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False))


def unigram() -> PreTrainedTokenizerFast:
    """T5's and Gemma's kind: the likeliest pieces, after NFKC."""
    pieces = [("<unk>", -99.0), ("<pad>", -99.0), ("<s>", -99.0), ("</s>", -99.0), ("▁", -2.0)]
    pieces += [("▁" + w, -3.0) for w in _WORDS] + [(w, -4.0) for w in _WORDS]
    known = {p for p, _ in pieces}
    pieces += [(chr(i), -8.0) for i in [10, *range(33, 127)] if chr(i) not in known]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return _finish(core)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: words, then pieces of words; accents and spaces are lost."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *_WORDS, *(chr(i) for i in range(33, 127))]
    names += ["##" + chr(i) for i in range(97, 123)]
    vocabulary: dict[str, int] = {}
    for name in names:
        vocabulary.setdefault(name, len(vocabulary))
    core = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _finish(core)


TOKENIZERS = {f.__name__: cache(f) for f in (byte_level, legacy_prefix, first_prefix, unigram, word_piece)}
