"""Shows the constructor of Equinox modules on the API page. As in a dataclass, it takes the fields in order."""

import griffe  # pyright: ignore[reportMissingImports]


class EquinoxModules(griffe.Extension):
    """An extension of griffe that adds `__init__` to each class that derives from `eqx.Module`."""

    def on_class_members(self, *, cls: griffe.Class, **_):
        if "eqx.Module" not in map(str, cls.bases) or "__init__" in cls.members:
            return
        fields = [member for member in cls.members.values() if isinstance(member, griffe.Attribute) and _is_field(member)]
        parameters = [griffe.Parameter(field.name, default=_default(field), kind=KEYWORD) for field in fields]
        itself = griffe.Parameter("self", kind=KEYWORD)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *parameters)))


def _is_field(member: griffe.Attribute) -> bool:
    """Whether a member is a field. griffe counts a property as an attribute with an annotation too."""
    return member.annotation is not None and "property" not in member.labels


def _default(field: griffe.Attribute) -> str:
    """The default of a field: its value, or the default that `eqx.field` is given."""
    given = [a.value for a in getattr(field.value, "arguments", ()) if getattr(a, "name", None) == "default"]
    return str(given[0] if given else field.value)


KEYWORD = griffe.ParameterKind.positional_or_keyword
