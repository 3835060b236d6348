"""Models of the Hugging Face hub: their snapshot in that library's cache, or one sentence on why there is none."""

from __future__ import annotations

from pathlib import Path

from specpass.errors import FetchError, GatedModelError, RevisionError, UnknownModelError

# No second copy of the weights in old formats. Code is fetched and not run unless it is trusted.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py")


def snapshot(hub_id: str, revision: str | None = None) -> Path:
    """The snapshot of a hub model in the Hugging Face cache, downloaded where HF_HUB_OFFLINE allows it.

    Raises:
        GatedModelError: its terms were not accepted, or nobody is logged in.
        RevisionError: the hub has the model and not this revision.
        UnknownModelError: the hub has no such model.
        FetchError: it is not in the cache and the hub is out of reach.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(_FILES), cache_dir=constants.HF_HUB_CACHE)
        )
    except GatedRepoError as error:
        raise GatedModelError(
            f"the hub model {hub_id!r} is gated: accept its terms at https://huggingface.co/{hub_id}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"the hub has no model {hub_id!r}, or a private one, and there is no such folder here: check the spelling, "
            "or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise RevisionError(
            f"the hub model {hub_id!r} has no revision {revision!r}: name one of its branches, tags or commits, listed "
            f"at https://huggingface.co/{hub_id}/tree/main."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        wanted = repr(hub_id) if revision is None else f"{hub_id!r} at revision {revision!r}"
        reason = (
            "HF_HUB_OFFLINE is set: unset it to download the model"
            if constants.is_offline_mode()
            else f"the hub is out of reach ({type(error.__cause__ or error).__name__}): check the network and the name"
        )
        raise FetchError(
            f"the hub model {wanted} is not in {constants.HF_HUB_CACHE}, no folder here has that name, and {reason}, "
            "or give a folder."
        ) from error
