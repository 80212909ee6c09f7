"""One server for chat and embeddings, asked by OpenAI's client (`pip install openai`). Start it first:

gemify serve --model starter-gated
"""

from openai import OpenAI

URL = "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=URL, api_key="none")
model = client.models.list().data[0].id

# %% Embed
texts = ["The museum opens at noon.", "Zelda keeps bees."]
vectors = [row.embedding for row in client.embeddings.create(model=model, input=texts).data]
print(len(vectors), "vectors of", len(vectors[0]), "numbers")

# %% Chat, by the same weights
messages = [{"role": "user", "content": "Say hello."}]
for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=30, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
