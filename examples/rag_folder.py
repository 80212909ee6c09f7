"""Ask a folder of documents. One model finds the passages and answers. Needs `pip install 'gemify[rag]'`."""

from gemify import GemIndex, GemModel, GemRag

MODEL = "starter-gated"  # or your own GEM; a larger base answers better
FOLDER = "docs"  # text, Markdown, HTML, PDF, Office files, code
QUESTION = "How do I keep an index that another model wrote?"

# %% Index: run it again when files have changed, and only what is new is embedded
gem = GemModel.from_pretrained(MODEL)
index = GemIndex.open("my-store", gem, model_name=MODEL)
report = index.add(FOLDER, show_progress_bar=True)
print(f"{report.chunks} new passages, {len(index)} in all")

# %% Search
for passage in index.search(QUESTION, k=3):
    print(f"{passage.score:.3f} {passage.file}, {passage.location}")

# %% Ask: the question runs once, to search and to be answered
answer = GemRag(gem, index).ask(QUESTION, on_text=lambda text: print(text, end="", flush=True))
print("", *answer.sources(), sep="\n")
