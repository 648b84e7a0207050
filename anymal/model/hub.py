"""What the hub says of a model: why it cannot be loaded, after one request (libraries try five times); its licence."""

import functools
from pathlib import Path


def unavailable(name: str, file: str = "config.json") -> str | None:
    """Why a file of a model cannot be loaded, as far as one short look tells; None if it may be.

    Args:
        name: Hub name or local folder.
        file: One that whoever loads the model needs. Where the cache has it, nothing is asked.
    """
    return None if Path(name).exists() else _refused(name, file)


@functools.cache
def _refused(name: str, file: str) -> str | None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return None
        get_hf_file_metadata(hf_hub_url(name, file, endpoint=constants.ENDPOINT))
    except HFValidationError:
        return f"there is no folder {name}"
    except GatedRepoError:
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and log in (hf auth login, or "
            "HF_TOKEN)"
        )
    except RepositoryNotFoundError:
        return (
            f"there is no folder {name}, and no such model on the hub (a private one wants hf auth login, or HF_TOKEN)"
        )
    except HfHubHTTPError:  # the file alone is not there, or the hub is busy: whoever loads it tries again, or says so
        return None
    except Exception as error:  # of the connection; the HTTP library's own, or HF_HUB_OFFLINE
        return f"there is no folder {name}, it is not in the hub's cache, and the hub cannot be reached: {error}"
    return None


def license_of(name: str) -> str:
    """The licence that the model card (README.md) of a hub name or local folder states, or ``"unknown"``."""
    from huggingface_hub import ModelCard

    path = Path(name)
    if (path.is_dir() and not (path / "README.md").is_file()) or unavailable(name, "README.md"):
        return "unknown"
    try:
        card = ModelCard.load(path / "README.md" if path.is_dir() else name)
    except Exception:  # no network, no card, or YAML that does not parse: the licence is not known then
        return "unknown"
    return str(card.data.get("license") or "unknown")
