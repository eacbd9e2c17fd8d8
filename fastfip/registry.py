"""Tables of what has a name and a file of its own: methods, attacks. A file that is in the folder is found.

Other packages add to them by entry points, in a group named like the package here, e.g. `fastfip.methods`; each is a
class. A class that nobody registered is named by where it is: `module:Class`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastfip.errors import ConfigError, choices, reason

__all__ = ["Registry", "working_folder_importable"]

T = TypeVar("T", bound=type)
C = TypeVar("C", bound=type)


@contextlib.contextmanager
def working_folder_importable() -> Iterator[None]:
    """Let modules in the working folder be imported in a block, after everything that is installed.

    Last and only for the block: a folder that was downloaded may hold a module with the name of a dependency.
    """
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()  # the last one is the one that was appended
        with contextlib.suppress(ValueError):  # a module of the user's may have taken it off
            sys.path.remove(here)
        sys.path.reverse()


class Registry(Generic[T]):
    """Classes of one kind by their `name`; those of the package are imported when somebody asks for them.

    Modules and folders whose name begins with an underscore are parts that several share, and are passed over.
    """

    def __init__(self, kind: str, package: str, base: type) -> None:
        """Make an empty table.

        Args:
            kind: what errors call an entry, e.g. "method".
            package: the full name of the package whose modules register themselves, and of the group of entry points.
            base: what every entry is a subclass of.
        """
        self.kind, self.package, self.base = kind, package, base
        self._known: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, cls: C) -> C:
        """Make a class known by its `name`; a class decorator.

        Raises:
            TypeError: it has no `name` or `summary`, or another class has its name.
        """
        entry: Any = cls
        for attribute in ("name", "summary"):
            if not isinstance(getattr(cls, attribute, None), str):
                raise TypeError(f"{cls.__name__} needs a class attribute {attribute}")
        self._import_own(entry.name)  # a name of the package's own is not free, whether or not it was used before
        other = self._known.get(entry.name)
        if other is not None and _place(other) != _place(cls):
            raise TypeError(f"the {self.kind}s {_place(other)} and {_place(cls)} have one name, {entry.name!r}")
        self._known[entry.name] = entry
        return cls

    def names(self) -> list[str]:
        """Return all names, sorted."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        self._load_plugins()
        return sorted(self._known)

    def _import_own(self, name: str) -> None:
        """Import the file of the package that has this name, if there is one, without importing all the others."""
        module = f"{self.package}.{name}"
        if str(name).isidentifier() and module not in sys.modules and importlib.util.find_spec(module):
            importlib.import_module(module)

    def _load_plugins(self) -> None:
        """Register what other packages offer; one that is broken is said to be so, and the others are there."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in importlib.metadata.entry_points(group=self.package):
            try:
                self.register(self._checked(point.load(), point.value))
            except Exception as error:  # whatever somebody else's package raises
                said = f"the {self.kind} {point.name!r} ({point.value}) cannot be used"
                warnings.warn(f"{said}: {type(error).__name__}: {reason(error)}", stacklevel=2)

    def _checked(self, entry: Any, where: str) -> T:
        if not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise ConfigError(f"{where} is no {self.kind}: it must be a subclass of {self.base.__name__}")
        return entry  # type: ignore[return-value]  # T is the base's type

    def _from_module(self, spec: str) -> T:
        """Return the class that `module:Class` names; modules of the working folder are found as well."""
        module, _, name = spec.partition(":")
        try:
            with working_folder_importable():
                entry = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the user's module raises
            raise ConfigError(f"no {self.kind} {spec!r}: {type(error).__name__}: {reason(error)}") from error
        try:
            return self.register(self._checked(entry, spec))
        except TypeError as error:
            raise ConfigError(f"{spec} cannot be used: {error}") from None

    def get(self, name: str) -> T:
        """Return the class of this name, or the one that `module:Class` names.

        Raises:
            ConfigError: there is none; the nearest is named.
        """
        if ":" in str(name):
            return self._from_module(name)
        if name not in self._known:
            self._import_own(name)
        if name not in self._known:
            known = self.names()
            if name not in self._known:
                raise ConfigError(f"no {self.kind} {name!r}{choices(name, known)}")
        return self._known[name]


def _place(cls: type) -> str:
    """Return where a class is defined."""
    return f"{cls.__module__}.{cls.__qualname__}"
