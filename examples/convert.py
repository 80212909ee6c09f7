"""Convert a language model: it writes as before, and it embeds. Minutes on a CPU."""

import torch

from gemify.model.base import load_base
from gemify.training.recipe import Recipe
from gemify.training.trainer import train

BASE = "starter"  # or a directory, a repo id of the Hugging Face Hub, a GGUF file
TEXTS = "my_texts.txt"  # some thousand texts of your field, one a line
STEPS = 150

# %% Train
recipe = Recipe(base=BASE, data=TEXTS, max_steps=STEPS, ntp_steps=STEPS * 2 // 5)
gem, summary = train(recipe, "my-gem")

# %% It embeds, and it writes
vectors = gem.encode(["How do I sort a list?", "putting items in order", "The weather is fine."])
print(gem.similarity(vectors, vectors))
print(gem.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=20))

# %% Its language is the base's, to the last bit
base, tokenizer = load_base(BASE, dtype=gem.lm.dtype, device=gem.device)
ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"].to(gem.device)
print(torch.equal(gem.lm(ids).logits, base(ids).logits))
