"""Checkpoints on the Hugging Face hub: fetched as plain directories, after looking at what they hold.

Only configuration, tokenizer and safetensors files are asked for; Python files and pickles stay where they
are unless the caller allowed them. Ordinary hub models go to Hugging Face's own cache, as every other tool's
do.
"""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from interp.zoo.errors import LoadError

#: Seconds to wait for the hub's first answer. It answers in well under one; nobody should wait longer to
#: learn it is away.
TIMEOUT = 3.0

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # configuration and tokenizer
_WEIGHTS = ["*.safetensors"]
_PICKLE = ["pytorch_model*.bin"]
_ELSEWHERE = ["*/*"]  # other formats and other checkpoints live in subfolders


def endpoint() -> str:
    """The hub's address: `$HF_ENDPOINT` (mirrors, tests) or the public one. Read at call time."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def unreachable(repo: str) -> str | None:
    """Why the hub cannot be asked about `repo` now, in a few words, or None when it answers. Takes at most 3
    s."""
    from huggingface_hub import constants

    if constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    ):
        return "offline mode (HF_HUB_OFFLINE is set)"
    reason = [f"no answer from {endpoint()} in {TIMEOUT:.0f} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(f"{endpoint()}/api/models/{repo}", method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
            reason.clear()
        except urllib.error.HTTPError:  # any answer, even a 404, means that the hub is there
            reason.clear()
        except (OSError, ValueError) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLError):
                reason.clear()  # there, behind certificates that the hub's client may know and Python does not
                return
            reason[:] = [f"no answer from {endpoint()} ({getattr(error, 'reason', error)})"]

    # in a thread, because the look-up of a name has no time limit of its own
    asking = threading.Thread(target=probe, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return reason[0] if reason else None


def fetch(
    repo: str,
    inspect: Callable[[Path], None],
    *,
    revision: str | None = None,
    local_dir: Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """The directory of the hub checkpoint `repo` at `revision`, downloaded unless it already is.

    `inspect` sees the directory while it holds only the small files, and refuses by raising before gigabytes
    follow. `local_dir` puts the files there instead of into Hugging Face's cache. Raises LoadError when the
    hub does not answer and the checkpoint is not cached, when it does not exist or is gated, and when a
    download breaks off.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    away = unreachable(repo)
    if away is not None:
        if local_dir is None:
            with suppress(LocalEntryNotFoundError):
                return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        raise LoadError(
            f"{repo}: not in the local Hugging Face cache, and the hub cannot be asked: {away}. "
            "Connect once, or pass a local directory"
        )

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                local_dir=local_dir,
                endpoint=endpoint(),
                etag_timeout=TIMEOUT,
                allow_patterns=patterns,
                ignore_patterns=_ELSEWHERE,
            )
        )

    with _plain_words(repo, revision):
        inspect(download(_SMALL + (["*.py"] if trust_remote_code else [])))
        path = download(_WEIGHTS)
        if not any(path.glob("*.safetensors")):
            files = HfApi(endpoint=endpoint()).list_repo_files(repo, revision=revision)
            if pickles := [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
                if not allow_pickle:
                    raise LoadError(pickle_refusal(repo, pickles))
                path = download(_PICKLE)
    return path


def fetch_tokenizer(repo: str) -> Path:
    """The directory of the small files of `repo`: its tokenizer without its weights. Raises LoadError as
    `fetch` does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    away = unreachable(repo)
    with _plain_words(repo, None):
        if away is None:
            found = snapshot_download(
                repo,
                endpoint=endpoint(),
                etag_timeout=TIMEOUT,
                allow_patterns=_SMALL,
                ignore_patterns=_ELSEWHERE,
            )
            return Path(found)
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(repo, local_files_only=True))
    raise LoadError(
        f"{repo}: no such directory, not in the local Hugging Face cache, and the hub cannot be asked: {away}"
    )


def pickle_refusal(source: str, files: Sequence[str]) -> str:
    """The words in which a checkpoint that exists only as a pickle is refused."""
    return (
        f"{source}: the weights are only there as a pickle ({', '.join(sorted(files)[:3])}), which "
        f"can run code "
        "when it is opened. If you trust the source pass allow_pickle=True (it is then read with "
        "torch.load's "
        "weights_only=True), or ask its authors for safetensors"
    )


@contextmanager
def _plain_words(repo: str, revision: str | None) -> Iterator[None]:
    """The hub client's exceptions, as sentences that say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LoadError:
        raise
    except HFValidationError as error:
        raise LoadError(f"{repo}: not a hub id ({error})") from error
    except GatedRepoError as error:
        raise LoadError(f"{repo}: gated; accept its terms at {endpoint()}/{repo} and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"{repo}: no such model at {endpoint()} (or it is private: run `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise LoadError(f"{repo}: has no revision {revision!r}") from error
    except Exception as error:  # the client's, its HTTP library's and its storage backend's own classes
        raise LoadError(f"{repo}: the download broke off ({error}); try again, finished files are kept") from error
