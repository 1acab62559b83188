"""Gives Equinox modules their constructor in the API: it takes the fields, in order, as a dataclass's does."""

import griffe  # pyright: ignore[reportMissingImports]


class EquinoxModules(griffe.Extension):
    """For mkdocstrings: `__init__` from the fields of a class that derives from `eqx.Module`."""

    def on_class_members(self, *, cls: griffe.Class, **_):
        if "eqx.Module" not in map(str, cls.bases) or "__init__" in cls.members:
            return
        fields = [member for member in cls.members.values() if isinstance(member, griffe.Attribute) and member.annotation]
        parameters = [griffe.Parameter(field.name, default=_default(field), kind=KEYWORD) for field in fields]
        itself = griffe.Parameter("self", kind=KEYWORD)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *parameters)))


def _default(field: griffe.Attribute) -> str:
    """What the field is when it is not given: its value, or what `eqx.field` names as its default."""
    given = [a.value for a in getattr(field.value, "arguments", ()) if getattr(a, "name", None) == "default"]
    return str(given[0] if given else field.value)


KEYWORD = griffe.ParameterKind.positional_or_keyword
