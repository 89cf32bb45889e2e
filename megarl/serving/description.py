"""The description of POST /score in the server's OpenAPI page."""

from typing import Any

_TEXTS = {"type": "array", "items": {"type": "string"}}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}, "where": {"type": "string"}},
    "required": ["error"],
}
_REFUSALS = {
    "401": "The bearer token is missing or wrong.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
    "422": "The request is not valid, or a text is too long; `where` is the place.",
    "503": "The server is stopping, or serves as many requests, or as large ones, as it may.",
}


def _question(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: {"type": "array", "items": entry}, "outputs": _TEXTS},
        "required": [key, "outputs"],
        "additionalProperties": False,
    }


SCORE_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        _question("prompts", {"type": "string"}),
                        _question("conversations", {"type": "array", "items": _MESSAGE, "minItems": 1}),
                    ]
                }
            }
        },
    }
}
"""One prompt or conversation for each output."""

SCORE_ANSWERS: dict[int | str, dict[str, Any]] = {
    "200": {
        "description": "A score for each output, in order, and the fingerprint of the model.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "scores": {"type": "array", "items": {"type": "number"}},
                        "model": {"type": "string"},
                    },
                    "required": ["scores", "model"],
                }
            }
        },
    },
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    },
}
