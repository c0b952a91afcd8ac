"""The way to the Hub and back: what it refuses is told in words, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the library for HTTP, which changed between its versions
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that is valid",
    403: "the token may not do that: take a token with the role write, or a repository of yours",
}


def upload_checkpoint(
    staged: str | Path, repo_id: str, *, private: bool = True, revision: str | None = None, token: str | None = None
) -> str:
    """Upload a staged folder as one commit, and return its address.

    Parameters
    ----------
    staged
        Made by `stage_checkpoint`.
    repo_id
        ORGANISATION/NAME; made if it is not there.
    private
        Whether a new repository is; one that is there stays what it is.
    revision
        Branch; default main.
    token
        Default: the one that is logged in.

    Raises
    ------
    OSError
        The Hub refuses or cannot be reached.
    """
    hub = HfApi(token=token)
    with _told(repo_id):
        hub.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(staged),
            revision=revision,
            commit_message="Publish with screformer",
            delete_patterns="*",  # an earlier version's files, which nothing would check
        )
    return str(commit.commit_url)


def refuse_offline(repo_id: str) -> None:
    """Raise OSError where nothing can be uploaded."""
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"HF_HUB_OFFLINE is set, so that nothing can be uploaded to {repo_id}; unset it")


def download_checkpoint(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder of a repository of the Hub, from the cache where it is there.

    Raises
    ------
    OSError
        It is not there or cannot be reached.
    """
    with _told(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, token=token))


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into OSError with the remedy."""
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{repo_id} is not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set; check the network"
        ) from error
    except GatedRepoError as error:
        raise OSError(f"{repo_id} is gated: ask for access on its page, and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id} has no such revision; `hf repos branch` and its page name those it has") from error
    except EntryNotFoundError as error:
        raise OSError(f"{repo_id} lacks a file: {error}") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"the Hub has no {repo_id}, or does not show it to you: check the name, and log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = REMEDIES.get(status, f"try again later ({error})") if status is not None else f"try again ({error})"
        raise OSError(f"the Hub refused {repo_id} (status {status}): {remedy}") from error
    except HTTPError as error:
        raise OSError(
            f"the connection to the Hub broke ({error}); call it again: what was downloaded of {repo_id} is kept"
        ) from error
