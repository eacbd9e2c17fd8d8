"""Tables of what has a name and a file of its own: methods, attacks. A file that is in the folder is found."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any, Generic, TypeVar

from fastfip.errors import ConfigError, choices

__all__ = ["Registry"]

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by their `name`; those of the package are imported when somebody asks for them.

    Modules and folders whose name begins with an underscore are parts that several share, and are passed over.
    """

    def __init__(self, kind: str, package: str) -> None:
        """Make an empty table.

        Args:
            kind: what errors call an entry, e.g. "method".
            package: the full name of the package whose modules register themselves.
        """
        self.kind, self.package = kind, package
        self._known: dict[str, T] = {}

    def register(self, cls: T) -> T:
        """Make a class known by its `name`; a class decorator.

        Raises:
            TypeError: it has no `name` or `summary`, or another class has its name.
        """
        entry: Any = cls
        for attribute in ("name", "summary"):
            if not isinstance(getattr(cls, attribute, None), str):
                raise TypeError(f"{cls.__name__} needs a class attribute {attribute}")
        other = self._known.get(entry.name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(
                f"the {self.kind}s {other.__qualname__} and {cls.__qualname__} have one name, {entry.name!r}"
            )
        self._known[entry.name] = cls
        return cls

    def names(self) -> list[str]:
        """Return all names, sorted."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self._known)

    def get(self, name: str) -> T:
        """Return the class of this name.

        Raises:
            ConfigError: there is none; the nearest is named.
        """
        own_file = f"{self.package}.{name}"
        if name not in self._known and str(name).isidentifier() and importlib.util.find_spec(own_file):
            importlib.import_module(own_file)  # without importing all the others
        if name not in self._known:
            known = self.names()
            if name not in self._known:
                raise ConfigError(f"no {self.kind} {name!r}{choices(name, known)}")
        return self._known[name]
