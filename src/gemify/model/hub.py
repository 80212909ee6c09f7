"""GEMs on the Hugging Face Hub: the model card, and the upload of a directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from gemify.io.tables import first_line
from gemify.model.base import STARTER, STARTER_REPO
from gemify.model.config import CONFIG_FILE, GemConfig

CARD_FILE = "README.md"


def model_card(name: str, config: GemConfig) -> str:
    """Return the README.md of a GEM: metadata, what it is, and how it is loaded.

    Args:
        name: A repo id or a directory's name.
        config: The GEM's configuration.
    """
    base = STARTER_REPO if config.base == STARTER else config.base
    hub_name = base if base.count("/") == 1 and not Path(base).exists() else None
    weights = (
        "The base model's weights are untouched: without a special token in the input, logits are the base's to the"
        " bit."
        if config.frozen_base
        else "The base model's weights were trained, so its language model has changed: see the differences below."
    )
    return f"""---
library_name: gemify
tags:
- embeddings
- feature-extraction
- gemify
- sentence-transformers
{f"base_model: {hub_name}" if hub_name else ""}
---

# {name}

One language model that writes and embeds: {Path(base).name}, tuned `{config.tune}` with {config.k} special token(s)
by gemify (GEM, arXiv 2506.04344). {weights}

```python
from gemify import GemModel

gem = GemModel.from_pretrained("{name}")
vectors = gem.encode(["a text", "another"])
answer = gem.chat([{{"role": "user", "content": "a question"}}])
```
"""


def require_public_base(config: GemConfig) -> None:
    """Refuse to upload a GEM whose base is a path.

    Raises:
        ValueError: It is one, and the GEM needs its base.
    """
    if config.tune != "full" and Path(config.base).exists():
        raise ValueError(
            f"the base {config.base} is a path of this machine, where nobody else finds it: give base_model, its repo"
            " id on the hub, to the GEM's own push_to_hub"
        )


class HubMixin:
    """Uploads a GEM."""

    config: GemConfig

    def save_pretrained(self, path: str | Path) -> None:
        """Save to a directory."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to the Hugging Face Hub what `save_pretrained` writes, in one commit.

        A README.md with the model's metadata is written if the repo has none.

        Args:
            repo_id: ``user/name``; the repo is made if it does not exist.
            base_model: Repo id of the base, where it was loaded from a path.
            private: Whether a new repo is private. None: the organization's default.
            token: Of the hub. None: that of ``hf auth login`` or ``HF_TOKEN``.
            revision: The branch, which is made if it does not exist. None: main.
            commit_message: None: "Upload GEM".
            create_pr: Open a pull request instead.

        Returns:
            The commit's address.

        Raises:
            ValueError: The base is a path and ``base_model`` is not given, or the hub refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        config = self.config
        if base_model is not None:
            config = dataclasses.replace(config, base=base_model, base_revision=None)
        elif config.tune == "full" and Path(config.base).exists():  # the base is not needed again
            config = dataclasses.replace(config, base=Path(config.base).name)
        require_public_base(config)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            with TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                (Path(folder) / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
                if not api.file_exists(repo_id, CARD_FILE, revision=revision):
                    (Path(folder) / CARD_FILE).write_text(model_card(repo_id, config), encoding="utf-8")
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message or "Upload GEM",
                    create_pr=create_pr,
                )
        except (HfHubHTTPError, HFValidationError) as error:
            raise ValueError(f"cannot upload to {repo_id}: {first_line(error)}") from error
        return str(commit.commit_url)
