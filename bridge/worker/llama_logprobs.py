"""How likely the model held a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from bridge.worker.llama_vocab import Vocab


def explain(vocab: Vocab, logits: Any, token: int, top: int) -> dict[str, Any]:
    """OpenAI's entry: natural logarithms of the model's probabilities, before bias, penalties and temperature."""
    peak = logits.max()
    logprobs = logits - (peak + np.log(np.exp(logits - peak).sum()))
    best: list[int] = np.argpartition(logprobs, -top)[-top:].tolist() if top else []
    best.sort(key=lambda one: -float(logprobs[one]))
    entry = _logprob(vocab, token, logprobs)
    entry["top_logprobs"] = [_logprob(vocab, one, logprobs) for one in best]
    return entry


def _logprob(vocab: Vocab, token: int, logprobs: Any) -> dict[str, Any]:
    spelling = vocab.spelling(token)
    return {
        "token": spelling.decode(errors="replace"),
        "logprob": round(float(logprobs[token]), 5),
        "bytes": list(spelling),
        "id": token,
    }
