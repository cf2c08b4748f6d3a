"""The settings of the authors' scripts, by one word."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from safeshard.streamer.options import Options


class Published(Options):
    """Of methods whose authors' scripts set something otherwise than the defaults here."""

    published: ClassVar[dict[str, Any]] = {}  # what their recipe sets, where it is not given

    recipe: Literal["published"] | None = Field(
        None, description="published: what is not given is as in the authors' scripts (docs/differences.md)"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("recipe") == "published":
            return {**cls._recipe(values), **values}
        return values

    @classmethod
    def _recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        return cls.published
