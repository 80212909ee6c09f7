"""Keep the index that another embedder wrote: train a GEM into its space, and drop the second model."""

from sentence_transformers import SentenceTransformer

from gemify.training.recipe import PRESETS, Recipe
from gemify.training.trainer import train

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"  # the model that wrote your index
BASE = "starter"  # the model that answers
TEXTS = "my_texts.txt"  # texts like those in the index, one a line
STEPS = 600
PASSAGES = ["The museum opens at noon.", "Zelda keeps bees behind the mill."]

# %% The index as it is
index = SentenceTransformer(EMBEDDER).encode(PASSAGES, normalize_embeddings=True)

# %% Train
settings = {"base": BASE, "data": TEXTS, "teacher": f"st:{EMBEDDER}", "max_steps": STEPS}
recipe = Recipe.from_dict(PRESETS["align"] | settings)
gem, summary = train(recipe, "my-aligned-gem")

# %% The GEM's question, the embedder's passages
scores = gem.similarity(gem.encode_query("When does the museum open?"), index)
print(PASSAGES[scores.argmax()])
