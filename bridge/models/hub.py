"""Which files of a Hub repository are meant, and where their bytes are.

The library (huggingface_hub) says what there is, how long each file is, its SHA-256, and who we are: HF_ENDPOINT,
HF_TOKEN and its stored login count as everywhere. The bytes come by download.py: the library's own download throws
away what came when its process ends, keeps the file in a cache of its own, and does not compare the SHA-256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import httpx2

from bridge.models.download import Remote
from bridge.models.names import is_model, split_quant, stem_of, whole_models
from protocol.errors import BridgeError, ErrorCode

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

DEFAULT_QUANT = "Q4_K_M"
TIMEOUT = 30.0  # seconds, for the list of files


def find(repo: str, quant: str | None, file: str | None) -> list[Remote]:
    """The files of one model, its shards in order: of the quantisation, or that file, or the one that suits.

    Raises BridgeError: not_found, forbidden, ambiguous (with candidates), bad_model (shards are missing),
    unsupported (the library is not installed), pull_failed (the Hub cannot be reached, or does not answer as one).
    """
    siblings, commit = _list(repo)
    chosen = choose(repo, list(siblings), quant, file)
    return [_remote(repo, siblings[name], commit) for name in chosen]


# -- which ---------------------------------------------------------------------------------------------------------


def choose(repo: str, names: list[str], quant: str | None, file: str | None) -> tuple[str, ...]:
    """Of the repository's files those of one model. Raises BridgeError: not_found, ambiguous, bad_model."""
    files = sorted(name for name in names if is_model(_base(name)))
    models = whole_models(files, str)
    if file in files and not any(file in model for model in models):
        raise BridgeError(ErrorCode.BAD_MODEL, f"{repo}: of the shards of {file} some are missing")
    if file is not None:
        fitting = [model for model in models if file in model]
    elif quant is not None:
        fitting = [model for model in models if _quant(model) == quant.upper()]
    else:
        fitting = models if len(models) == 1 else [model for model in models if _quant(model) == DEFAULT_QUANT]
    if len(fitting) == 1:
        return fitting[0]
    candidates = _candidates(repo, fitting or models)
    listed = ", ".join(candidates) or "no GGUF files"
    if fitting or (models and quant is None and file is None):
        raise BridgeError(ErrorCode.AMBIGUOUS, f"{repo} has several models; say which: {listed}", candidates=candidates)
    raise BridgeError(ErrorCode.NOT_FOUND, f"{repo} has no {file or quant or 'model'}; it has {listed}")


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _quant(model: Sequence[str]) -> str | None:
    """The quantisation that the file's name tells, in upper case."""
    quant = split_quant(stem_of(_base(model[0])))[1]
    return quant.upper() if quant else None


def _candidates(repo: str, models: Sequence[Sequence[str]]) -> list[str]:
    """What to type for each: by its quantisation where that is enough."""
    quants = [_quant(model) for model in models]
    return [
        f"{repo}:{quant}" if quant and quants.count(quant) == 1 else f"{repo}/{model[0]}"
        for model, quant in zip(models, quants, strict=True)
    ]


# -- where ---------------------------------------------------------------------------------------------------------


def _list(repo: str) -> tuple[dict[str, RepoSibling], str | None]:
    """The files of the newest revision by their paths, and its commit."""
    hub = _library()
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT)
        return {sibling.rfilename: sibling for sibling in info.siblings or []}, info.sha
    except (hub.errors.HfHubHTTPError, hub.errors.OfflineModeIsEnabled, hub.errors.HFValidationError) as error:
        raise _translated(hub, repo, error) from error
    except httpx2.HTTPError as error:
        raise _unreachable(repo, str(error) or type(error).__name__) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of its JSON
        raise _unreachable(repo, f"what answers is no Hub: {error}") from error


def _remote(repo: str, sibling: RepoSibling, commit: str | None) -> Remote:
    """With a URL of this revision, so that all shards are of one."""
    hub = _library()
    name = sibling.rfilename
    url = hub.hf_hub_url(repo, name, revision=commit)
    login = hub.utils.build_hf_headers().get("authorization")
    headers = {"Authorization": login} if login else {}
    size, sha256 = sibling.size, sibling.lfs.sha256 if sibling.lfs else None
    if sha256 is None:
        size, sha256 = _ask_for(hub, repo, url, headers, size)
    return Remote(f"{repo}/{name}", _base(name), url, size, sha256, headers)


def _ask_for(hub: Any, repo: str, url: str, headers: dict[str, str], size: int | None) -> tuple[int | None, str | None]:
    """Size and SHA-256 as the file's own headers say: the ETag of a large one is its digest."""
    try:
        metadata = hub.get_hf_file_metadata(url, headers=headers, timeout=TIMEOUT)
    except hub.errors.HfHubHTTPError as error:
        raise _translated(hub, repo, error) from error
    except httpx2.HTTPError as error:
        raise _unreachable(repo, str(error) or type(error).__name__) from error
    is_digest = re.fullmatch("[0-9a-f]{64}", metadata.etag or "") is not None
    return metadata.size or size, metadata.etag if is_digest else None


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        message = "Models of the Hub need huggingface_hub; install it: pip install 'llama-bridge[hub]'"
        raise BridgeError(ErrorCode.UNSUPPORTED, message) from error
    return huggingface_hub


def _translated(hub: Any, repo: str, error: Exception) -> BridgeError:
    """The library's error in our words; subclasses come first."""
    match error:
        case hub.errors.GatedRepoError():
            message = f"{repo} is open only to those who agreed to its terms, and log in: set HF_TOKEN"
            return BridgeError(ErrorCode.FORBIDDEN, message)
        case hub.errors.RepositoryNotFoundError():  # the Hub does not say which of the two
            message = f"The Hub has no repository {repo}, or it is private and needs a login: set HF_TOKEN"
            return BridgeError(ErrorCode.NOT_FOUND, message)
        case hub.errors.HFValidationError():
            return BridgeError(ErrorCode.BAD_ARGUMENT, f"{repo}: {error}")
        case hub.errors.OfflineModeIsEnabled():
            return _unreachable(repo, "HF_HUB_OFFLINE is set")
        case _:
            return _unreachable(repo, " ".join(str(error).split()))


def _unreachable(repo: str, why: str) -> BridgeError:
    return BridgeError(ErrorCode.PULL_FAILED, f"{repo}: the Hub cannot be asked: {why}")
