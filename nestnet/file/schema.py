"""The JSON Schema of the network file: for editors, which complete and check with it while somebody types.

It says less than `check` does: what takes two values to see, no schema can say.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from nestnet.model.manifest import API_VERSION, Manifest

SCHEMA = "https://json-schema.org/draft/2020-12/schema"


class _Generator(GenerateJsonSchema):
    """Without null, which is never a value, and without titles, which only repeat the key."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        inner = super().default_schema(schema)
        if inner.get("default", ...) is None:
            inner.pop("default")
        return inner

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        mapping = super().dict_schema(schema)
        if "patternProperties" in mapping:
            mapping["additionalProperties"] = False
        return mapping

    def generate(self, schema: core_schema.CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        whole = super().generate(schema, mode)
        for model in (whole, *whole.get("$defs", {}).values()):
            model.pop("title", None)
            model["description"] = " ".join(str(model["description"]).split("\n\n")[0].split())
            for key in model["properties"].values():
                if "description" in key:
                    key["description"] = " ".join(key["description"].split())
        return whole


def json_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a file with apiVersion nestnet/v1."""
    schema = Manifest.model_json_schema(by_alias=True, schema_generator=_Generator)
    return {"$schema": SCHEMA, "title": f"nestnet network file, {API_VERSION}", **schema}
