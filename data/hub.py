"""Trained weights from the Hugging Face hub: its local cache first, the network only if it answers at once.

An unreachable hub costs its client half a minute a file, so it is probed once with a short limit. Nothing is ever
replaced by something else in silence: what cannot be obtained is an error that names the ways on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from .errors import WeightsError


def find_cached(repo_id: str, filenames: Sequence[str]) -> Path | None:
    """Return the first of the files that the hub's local cache holds, or None; touches no network."""
    from huggingface_hub import constants, try_to_load_from_cache

    for filename in filenames:
        found = try_to_load_from_cache(repo_id, filename, cache_dir=constants.HF_HUB_CACHE)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_answers(timeout_s: float = 3.0) -> bool:
    """Return whether the hub answers within the limit, in seconds; False in offline mode (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            if get_session().head(constants.ENDPOINT, timeout=timeout_s).status_code < 500:
                answered.set()
        except Exception:  # the client's network errors have no common base; each means no answer
            return

    # In a thread, since no timeout of a request covers the look-up of a name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answered.is_set()


def fetch(name: str, repo_id: str, filenames: Sequence[str], *, ways_on: str) -> Path:
    """Return the first of a hub repository's files that can be had, from the local cache or by download.

    name: of what the weights are for, and ways_on: what else the user can do, for messages.

    Raises WeightsError where none can be had.
    """

    def unobtainable(why: str) -> WeightsError:
        return WeightsError(f"{name}: the weights {repo_id} are not in the local hub cache, and {why}", hint=ways_on)

    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = find_cached(repo_id, filenames)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise unobtainable("HF_HUB_OFFLINE is set")
    if not hub_answers():
        raise unobtainable(f"{constants.ENDPOINT} does not answer")
    for filename in filenames:
        try:
            return Path(hf_hub_download(repo_id, filename, cache_dir=constants.HF_HUB_CACHE))
        except LocalEntryNotFoundError as error:  # the connection was lost: the file may well exist
            raise unobtainable(f"the download failed ({error})") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # refused, interrupted, disk full: the ways on are the same
            raise unobtainable(f"the download failed ({type(error).__name__}: {error})") from error
    raise unobtainable(f"the repository has no {' and no '.join(filenames)}")
