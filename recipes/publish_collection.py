"""Upload GEMs to the Hugging Face Hub and put them into one collection. Log in first: `hf auth login`.

    python recipes/publish_collection.py me "GEMs of mine" starter starter-gated my-gem

A directory's own README.md, where `gemify eval --card` writes measured results, is uploaded as the model's card.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi

from gemify import GemModel
from gemify.model.config import resolve_directory


def main(owner: str, title: str, *gems: str) -> str:
    api = HfApi()
    collection = api.create_collection(title, namespace=owner, exists_ok=True)
    for gem in gems:
        repo = f"{owner}/{Path(gem).name}"
        GemModel.from_pretrained(gem).push_to_hub(repo)
        if (card := resolve_directory(gem) / "README.md").is_file():
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
        api.add_collection_item(collection.slug, repo, "model", exists_ok=True)
    return f"{api.endpoint}/collections/{collection.slug}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
