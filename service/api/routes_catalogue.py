"""What a job may use: base models, and strategies and adapter methods with the schema of their parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, TypeAdapter

from clcore.engine.registry import STRATEGIES, config_class, parameter_docs, strategy_class
from service.api.deps import SettingsDep
from service.api.views import Page
from service.basemodels import known_models
from service.specs import LoraSpec

router = APIRouter(prefix="/v1", tags=["catalogue"])
PEFT_METHODS: dict[str, type[BaseModel]] = {"lora": LoraSpec}


class Choice(BaseModel):
    """Something with parameters, by the name that goes into `type`."""

    type: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema with the defaults of a job."""


class BaseModelView(BaseModel):
    """A prepared base model."""

    id: str


@router.get("/strategies")
def strategies() -> Page[Choice]:
    """List the strategies."""
    return Page(data=strategy_choices())


@cache
def strategy_choices() -> list[Choice]:
    """Describe every strategy; the first call imports them all, and torch with them."""
    found = []
    for name in STRATEGIES:
        config = config_class(name)
        schema = TypeAdapter(config).json_schema()
        for parameter, text in parameter_docs(config).items():
            schema["properties"][parameter]["description"] = text
        found.append(Choice(type=name, description=_first_line(strategy_class(name)), parameters=schema))
    return found


@router.get("/peft-methods")
def peft_methods() -> Page[Choice]:
    """List the adapter methods."""
    return Page(
        data=[
            Choice(type=name, description=_first_line(spec), parameters=spec.model_json_schema())
            for name, spec in PEFT_METHODS.items()
        ]
    )


@router.get("/base-models")
def base_models(settings: SettingsDep) -> Page[BaseModelView]:
    """List the prepared base models; hub ids (org/name) work too where a hub can be reached."""
    return Page(data=[BaseModelView(id=model.id) for model in known_models(settings.models_dir)])


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
