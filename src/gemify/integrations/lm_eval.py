"""A GEM's language model as lm-eval's model ``gemify`` (``pip install 'gemify[eval]'``).

    lm_eval run --model gemify --model_args pretrained=my-gem --tasks lambada_openai

lm-eval finds it by the entry point ``lm_eval.models``. Releases up to 0.4.13 know no plugins: with them
``python -m gemify.integrations.lm_eval`` takes the place of ``lm_eval``.
"""

from __future__ import annotations

from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lm_eval is not installed: pip install 'gemify[eval]'", name=error.name) from error

import torch

from gemify.evaluation.lm_eval_prefix_cache import share_prefixes
from gemify.model.gem import GemModel


@register_model("gemify")
class GemLM(HFLM):
    """lm-eval's ``HFLM`` with a GEM's language model. What prompts share runs once.

    Args:
        pretrained: A GEM's directory, repo id or shipped name.
        base: Where its base is. None: where its configuration says.
        revision: Of the GEM's repo.
        dtype: Of the weights.
        quantize: Bits of the base's weights.
        device: Where it runs. None: the accelerator if there is one.
        trust_remote_code: Whether to run Python that comes with the base.
        options: Those of ``HFLM`` that do not load a model, such as ``batch_size``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        base: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's command says cuda by default
        gem = GemModel.from_pretrained(
            pretrained,
            base=base,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        super().__init__(pretrained=gem.lm, tokenizer=gem.tokenizer, backend="causal", **options)
        share_prefixes(self)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
