"""What the package offers: one frozen record beside each definition.

``@register`` beside a method's class feeds the command line, the README table and the generic contract tests; there
is no central list. ``@register_command`` does the same for subcommands of ``lightning-opt``.
"""

import dataclasses
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

Kind = Literal["optimizer", "schedule", "callback", "strategy", "module", "data", "solver", "tool"]
T = TypeVar("T", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered class or function.

    Attributes:
        name: Its short name, unique in the package; what a user types.
        kind: Where it plugs in.
        target: The class or function itself.
        summary: One line for tables.
        paper: arXiv id such as ``"2010.07468"``, or ``""`` for what no paper proposed.
        card: File name of its method card in ``docs/methods/`` without suffix, or ``""``.
        log_prefix: The prefix of what it logs, unique in the package, or ``""``.
        capabilities: What the generic tests may ask of it, for example ``{"fused"}``.
        aliases: For a strategy, its short names for the Trainer and what each calls the class with.
    """

    name: str
    kind: Kind
    target: Callable[..., Any]
    summary: str
    paper: str = ""
    card: str = ""
    log_prefix: str = ""
    capabilities: frozenset[str] = frozenset()
    aliases: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand of ``lightning-opt`` that is not the Trainer's.

    Attributes:
        name: The word after ``lightning-opt``.
        summary: One line for the help page.
        run: Called with the remaining command-line words; returns an exit status.
    """

    name: str
    summary: str
    run: Callable[[list[str]], int]


_entries: dict[str, Entry] = {}
_commands: dict[str, Command] = {}


def register(
    kind: Kind,
    *,
    summary: str,
    paper: str = "",
    card: str = "",
    log_prefix: str = "",
    capabilities: tuple[str, ...] = (),
    aliases: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[T], T]:
    """Enter a class or function into the registry under its own name.

    Args:
        kind: Where it plugs in.
        summary: One line for tables.
        paper: arXiv id.
        card: File name of its method card in ``docs/methods/``, without suffix.
        log_prefix: The prefix of what it logs.
        capabilities: What the generic tests may ask of it.
        aliases: For a strategy, short names for ``Trainer(strategy=...)``, each with what the class is called with:
            ``{"ddp_ef21": {}}``. Written as a literal, for it is read from the source before anything is imported.

    Returns:
        A decorator that returns its argument unchanged.

    Raises:
        ValueError: If another object holds the name, the log prefix or an alias.

    Example:
        >>> from lightning_opt import registry
        >>> registry.load_all()
        {}
        >>> registry.find("AdaBelief").paper
        '2010.07468'
    """

    def decorate(target: T) -> T:
        entry = Entry(
            target.__name__, kind, target, summary, paper, card, log_prefix, frozenset(capabilities), aliases or {}
        )
        other = _entries.get(entry.name)
        if other is not None and _where(other.target) != _where(target):
            raise ValueError(f"{_where(target)} and {_where(other.target)} both register the name {entry.name!r}")
        for other in _entries.values():
            if log_prefix and other.log_prefix == log_prefix and other.name != entry.name:
                raise ValueError(f"{entry.name} and {other.name} both log under {log_prefix!r}")
            if other.name != entry.name and (shared := entry.aliases.keys() & other.aliases.keys()):
                raise ValueError(f"{entry.name} and {other.name} both have the alias {min(shared)!r}")
        _entries[entry.name] = entry
        return target

    return decorate


def register_command(name: str, *, summary: str) -> Callable[[T], T]:
    """Enter ``run(arguments) -> exit status`` as the subcommand ``lightning-opt NAME``.

    Args:
        name: The word after ``lightning-opt``.
        summary: One line for the help page.

    Returns:
        A decorator that returns its argument unchanged.

    Raises:
        ValueError: If another function holds the name.
    """

    def decorate(run: T) -> T:
        other = _commands.get(name)
        if other is not None and _where(other.run) != _where(run):
            raise ValueError(f"{_where(run)} and {_where(other.run)} both register the command {name!r}")
        _commands[name] = Command(name, summary, run)
        return run

    return decorate


def entries(kind: Kind | None = None) -> list[Entry]:
    """The entries of the modules imported so far, sorted by name; call :func:`load_all` first for all of them."""
    return sorted((e for e in _entries.values() if kind in (None, e.kind)), key=lambda e: e.name.lower())


def commands() -> list[Command]:
    """The commands of the modules imported so far, sorted by name; call :func:`load_all` first for all of them."""
    return sorted(_commands.values(), key=lambda c: c.name)


def find(name: str) -> Entry:
    """The entry with this short name.

    Raises:
        KeyError: If no imported module registers it.
    """
    return _entries[name]


def load_all() -> dict[str, str]:
    """Import every public module of the package, so that every entry is known.

    Returns:
        For each module that could not be imported because an extra is missing, what to install, for example
        ``{"lightning_opt.diffusion.sde": "lightning-opt[diffusion]"}``.

    Raises:
        ModuleNotFoundError: If a module is missing that no extra brings: that is a mistake in the package.
    """
    missing: dict[str, str] = {}
    for module in _walk("lightning_opt"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            extra = extra_of(error.name or "")
            if extra is None:
                raise
            missing[module] = f"lightning-opt[{extra}]"
    return missing


def _walk(package: str) -> Iterator[str]:
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        if info.name.rpartition(".")[2].startswith("_"):
            continue
        yield info.name
        if info.ispkg:
            try:
                yield from _walk(info.name)
            except ModuleNotFoundError:
                continue  # load_all imports the package itself and reports it


def extra_of(module: str) -> str | None:
    """The extra whose requirements bring a module, read from the installed metadata; ``None`` if there is none."""
    wanted = re.sub(r"[-_.]+", "-", module.partition(".")[0]).lower()
    for requirement in importlib.metadata.requires("lightning-opt") or []:
        match = re.match(r"([A-Za-z0-9._-]+).*;.*extra == ['\"]([a-z]+)['\"]", requirement)
        if match and re.sub(r"[-_.]+", "-", match[1]).lower() == wanted:
            return match[2]
    return None


def _where(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"
