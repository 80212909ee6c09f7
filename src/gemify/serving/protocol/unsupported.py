"""Well-known fields that this server does not have: asking something of them is a 400 that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemify.serving.errors import unsupported_parameter

Fields = Mapping[str, tuple[tuple[Any, ...], str]]
"""For each field the values that ask for nothing, and what the error says."""

_MAX_TOKENS = "it is max_tokens here"
_ONE_AT_A_TIME = "tokens are sampled one at a time: leave it out"
_TEXT_ONLY = "this model reads and writes text"
_ENCODING = "it is encoding_format here"
_N = "it is n here"
_TEMPLATE = "give the chat template's own variable in chat_template_kwargs"
_CUTOFFS = "use temperature, top_p, top_k, min_p or typical_p"
_DIMENSIONS = "it is dimensions here"
_PROMPT = "it is input_type or prompt_name here, or a part of the text"
_K = "it is k here"
_CUT = "documents are cut at the longest text that the model takes, by lm at 512 tokens: cut them yourself"

GENERATION: Fields = {
    # vLLM
    "use_beam_search": ((False,), _ONE_AT_A_TIME),
    "length_penalty": ((1,), "there is no beam search: leave it out"),
    "include_stop_str_in_output": ((False,), "add the stop string yourself"),
    "spaces_between_special_tokens": ((True,), "leave it out"),
    "truncate_prompt_tokens": ((), "cut the prompt yourself"),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "allowed_token_ids": (([],), "use structured_outputs"),
    "bad_words": (([],), "use logit_bias"),
    "logits_processors": (([],), "the server runs no code of clients"),
    "vllm_xargs": (({},), "leave it out"),
    "kv_transfer_params": ((), "leave it out"),
    "cache_salt": ((), "each API key has a prefix cache of its own"),
    "priority": ((0,), "requests are answered in their order"),
    "return_token_ids": ((False,), "POST the answer to /tokenize"),
    "return_tokens_as_token_ids": ((False,), "logprobs have each token's bytes"),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "guided_decoding_backend": ((), "it is llguidance here: leave it out"),
    "guided_whitespace_pattern": ((), "leave it out"),
    # SGLang, TGI and transformers
    "regex": ((), "use structured_outputs"),
    "ebnf": ((), "use structured_outputs"),
    "lora_path": ((), "adapters are not swapped"),
    "max_new_tokens": ((), _MAX_TOKENS),
    "min_new_tokens": ((0,), "it is min_tokens here"),
    "num_beams": ((1,), _ONE_AT_A_TIME),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty"),
    "do_sample": ((), "temperature 0 is greedy"),
    "watermark": ((False,), "leave it out"),
    "num_return_sequences": ((1,), _N),
    "min_length": ((0,), "it is min_tokens here"),
    "max_length": ((), _MAX_TOKENS),
    "bad_words_ids": (([],), "use logit_bias"),
    "suppress_tokens": (([],), "use logit_bias"),
    "stop_strings": (([],), "it is stop here"),
    "stop_regex": (([],), "use stop"),
    "early_stopping": ((False,), _ONE_AT_A_TIME),
    "diversity_penalty": ((0,), _ONE_AT_A_TIME),
    "penalty_alpha": ((0,), _CUTOFFS),
    "epsilon_cutoff": ((0,), _CUTOFFS),
    "eta_cutoff": ((0,), _CUTOFFS),
    "smoothing_factor": ((0,), _CUTOFFS),
    "guidance_scale": ((1,), "there is no classifier-free guidance: leave it out"),
    "custom_logit_processor": ((), "the server runs no code of clients"),
    "return_full_text": ((False,), "put the prompt before the answer yourself"),
    "decoder_input_details": ((False,), "use echo and logprobs of /v1/completions"),
    "top_n_tokens": ((), "use logprobs"),
    "adapter_id": ((), "adapters are not swapped"),
    "truncate": ((), "cut the prompt yourself"),
    # DeepSeek, Qwen, OpenRouter
    "thinking": (({"type": "disabled"},), _TEMPLATE),
    "enable_thinking": ((), _TEMPLATE),
    "thinking_budget": ((), _TEMPLATE),
    "reasoning": ((), "it is reasoning_effort here"),
    "include_reasoning": ((True,), "leave reasoning_content unread"),
    "extra_body": (({},), "its fields stand in the request itself"),
    # llama.cpp and Ollama
    "n_predict": ((), _MAX_TOKENS),
    "num_predict": ((), _MAX_TOKENS),
    "repeat_penalty": ((1,), "it is repetition_penalty here"),
    "grammar": (("",), "use structured_outputs"),
    "json_schema": ((), "use response_format"),
    "format": (("",), "use response_format"),
    "mirostat": ((0,), _CUTOFFS),
    "tfs_z": ((1,), _CUTOFFS),
    "repeat_last_n": ((), "repetition_penalty reads all of the prompt and the answer"),
    "num_ctx": ((), "the model's positions are the context: leave it out"),
    "think": ((), _TEMPLATE),
    "top_a": ((0,), "use min_p"),
    "top_n_sigma": ((-1, 0), "use min_p"),
    "dry_multiplier": ((0,), "use repetition_penalty"),
    "xtc_probability": ((0,), "leave it out"),
    "dynatemp_range": ((0,), "leave it out"),
    "options": (({},), "give each option as a field of the request"),
}
COMPLETION: Fields = {
    "suffix": (("",), "this model writes forwards: put everything before the answer into the prompt"),
    "add_special_tokens": ((True,), "give token ids as the prompt"),
}
CHAT: Fields = {
    "best_of": ((1,), "ask for n answers and choose one"),
    "echo": ((False,), "put the message before the answer yourself"),
    "add_special_tokens": ((False,), "the chat template writes them"),
    "documents": (([],), "gemify.search searches the server's own index"),
    "chat_template": ((), "the model's own is used"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "leave it out"),
    "verbosity": (("medium",), "ask for it in a message"),
    "web_search_options": ((), "gemify.search searches the server's own index"),
    "store": ((False,), "nothing is stored"),
}
_STATELESS = "nothing is stored: send the whole conversation"
_KEEP_THOUGHTS = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
MESSAGES: Fields = {
    "mcp_servers": (([],), "this server calls no others"),
    "container": ((), "this server runs no code"),
    "context_management": (({}, {"edits": []}, _KEEP_THOUGHTS), "cut the conversation yourself"),
    "output_format": ((), "it is output_config.format here"),
    "speed": (("standard",), "there is one speed"),
}
RESPONSES: Fields = {
    "previous_response_id": ((), _STATELESS),
    "conversation": ((), _STATELESS),
    "store": ((False,), "nothing is stored"),
    "background": ((False,), "an answer lives as long as its connection"),
    "prompt": ((), "give instructions and input"),
    "truncation": (("disabled",), "cut the conversation yourself"),
    "max_tool_calls": ((), "this server calls no tools itself"),
    "context_management": (([],), "cut the conversation yourself"),
    "top_logprobs": ((0,), "use logprobs of /v1/chat/completions"),
    "moderation": ((), "leave it out"),
}
EMBEDDING: Fields = {
    "add_special_tokens": ((True,), "give token ids as the input"),
    "messages": ((), "give texts as input"),
    "images": (([],), _TEXT_ONLY),
    "chat_template": ((), "give texts as input, as they are to be embedded"),
    "priority": ((0,), "requests are answered in their order"),
    "embedding_types": ((["float"],), _ENCODING),  # Cohere
    "output_dtype": (("float",), _ENCODING),  # Voyage
    "output_dimension": ((), _DIMENSIONS),
    "truncate_dim": ((), _DIMENSIONS),
    "matryoshka_dim": ((), _DIMENSIONS),
    "embed_dtype": (("float32",), _ENCODING),  # vLLM
    "precision": (("float32",), _ENCODING),
    "normalized": ((True,), "it is normalize here"),  # Jina
    "prompt": (("",), _PROMPT),
    "instruction": (("",), _PROMPT),
    "task_type": ((), _PROMPT),  # Google
    "pooling": ((), "the model's own is used"),
    "max_length": ((), "cut the text yourself, or give truncate_prompt_tokens"),
    "embedding_type": (("float",), _ENCODING),  # Jina
    "task": ((), "it is input_type or prompt_name here"),
    "late_chunking": ((False,), "each text is embedded by itself"),
    "return_multivector": ((False,), "a text has one vector"),
}
RERANK: Fields = {
    "max_tokens_per_doc": ((), _CUT),  # Cohere
    "max_chunks_per_doc": ((1,), _CUT),
    "rank_fields": ((["text"],), "give each document's text"),
    "priority": ((0,), "requests are answered in their order"),
    "truncate_prompt_tokens": ((-1,), _CUT),  # vLLM
    "top_k": ((), "it is top_n here"),  # Voyage
    "truncation": ((True,), _CUT),
    "raw_scores": ((False,), "there is one kind of score for each rerank"),  # text-embeddings-inference
    "return_embeddings": ((False,), "use /v1/embeddings"),  # Jina
}
SEARCH: Fields = {
    **dict.fromkeys(("top_k", "top_n", "limit", "n_results", "num_results", "max_results"), ((), _K)),
    "search_type": ((), "it is mode here"),
}
TOKENIZE: Fields = {
    "chat_template": ((), "the model's own is used"),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
}
MESSAGE: Fields = {
    "prefix": ((False,), "continue_final_message goes on from the last message"),
    "partial": ((False,), "continue_final_message goes on from the last message"),
    "function_call": ((), "use tool_calls"),
    "audio": ((), _TEXT_ONLY),
}
IGNORED = frozenset(
    {
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
        "request_id", "cache_prompt", "keep_alive", "cache_control", "inference_geo", "client_metadata",
    }
)  # fmt: skip
"""Well-known fields that change no answer."""


def refuse(given: Any, *tables: Fields) -> Any:
    """Return a request's body, or raise ApiError 400 if it asks something of an unsupported field."""
    if isinstance(given, dict):
        for table in tables:
            for name in [name for name in given if name in table]:
                harmless, message = table[name]
                if given[name] is not None and not any(_is_equal(given[name], value) for value in harmless):
                    raise unsupported_parameter(name, message)
    return given


def _is_equal(given: Any, value: Any) -> bool:
    return given == value and isinstance(given, bool) == isinstance(value, bool)
