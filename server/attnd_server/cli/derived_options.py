"""Options of a command, derived from dataclasses whose fields are settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import Field
from enum import Enum
from functools import wraps
from typing import Annotated, Any, NamedTuple

import typer

from attnd_server.cli import parsers
from attnd_server.config import GENERAL
from attnd_server.setting import Kind, Setting, environment_variable, option_name, settings, size_text


class _Form(NamedTuple):
    """How values of a kind are written: their type, their name in the help, and what makes their parser."""

    type: Any
    metavar: str | None = None
    parser: Callable[[Setting], Callable[[Any], Any]] | None = None


# typer takes no element types with a parser: frozenset, not frozenset[int].
_FORMS = {
    Kind.TEXT: _Form(str),
    Kind.FLAG: _Form(bool),
    Kind.CHOICE: _Form(str),
    Kind.COUNT: _Form(int, "N", lambda rule: parsers.whole(rule.low, rule.high)),
    Kind.FRACTION: _Form(float, "0..1", lambda rule: parsers.number(rule.low, rule.high)),
    Kind.SECONDS: _Form(float, "SECONDS", lambda rule: parsers.number(rule.low, rule.high)),
    Kind.BYTES: _Form(int, "BYTES|8GiB", lambda _: parsers.num_bytes),
    Kind.DEVICE: _Form(str, "NAME", lambda _: parsers.device_name),
    Kind.HOST: _Form(str, "HOST", lambda _: parsers.listen_host),
    Kind.ADDRESS: _Form(str, "[HOST:]PORT", lambda _: parsers.listen_address),
    Kind.USERS: _Form(frozenset, "UID,...", lambda _: parsers.users),
    Kind.NAMES: _Form(frozenset, "NAME,...", lambda _: parsers.names),
    Kind.FILE: _Form(str, "FILE"),
    Kind.FOLDER: _Form(str, "PATH"),
}


def with_settings(*kinds: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command of typer an option for each setting of some dataclasses; it gets one object of each of them."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapper(**values: Any) -> None:
            command(*(kind(**{each.name: _plain(values[each.name]) for each, _ in settings(kind)}) for kind in kinds))

        set_parameters(wrapper, [_parameter(*each) for kind in kinds for each in settings(kind)])
        return wrapper

    return decorated


def set_parameters(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Lets typer see these parameters, from which it makes the options of `command`."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def option_of(kind: type[Any], name: str) -> Any:
    """What typer makes an option of: that of one setting, for a command that has it too."""
    return next(_option(each, declared) for each, declared in settings(kind) if each.name == name)


def check_sizes(config: Any) -> None:
    """Raises `typer.BadParameter` if an amount of memory is beyond its limits."""
    for name, value, rule in _sizes(config):
        if value < rule.low or (rule.high is not None and value > rule.high):
            least = size_text(rule.low)
            limits = f"at least {least}" if rule.high is None else f"{least}..{size_text(rule.high)}"
            raise typer.BadParameter(f"{name} is {value}, but must be {limits}", param_hint=option_name(name))


def _sizes(config: Any) -> Iterator[tuple[str, int, Setting]]:
    for each, declared in settings(type(config)):
        if declared.kind is Kind.BYTES:
            yield each.name, getattr(config, each.name), declared


def _parameter(field: Field[Any], declared: Setting) -> inspect.Parameter:
    kind: Any = _FORMS[declared.kind].type
    default: Any = field.default
    if declared.kind is Kind.CHOICE:
        make_enum: Any = Enum  # from choices that are known only here
        kind = make_enum(field.name, [(choice.upper(), choice) for choice in declared.choices], type=str)
        default = kind(default)
    elif isinstance(default, float) and default.is_integer():
        default = int(default)  # the help says 60, not 60.0; the parser makes it a float again
    annotated: Any = Annotated
    annotation = annotated[kind, _option(field, declared)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(field: Field[Any], declared: Setting) -> Any:
    form, default_text = _FORMS[declared.kind], declared.default_text
    default: Any = field.default
    if declared.kind is Kind.BYTES and default:
        default_text = size_text(default)
    return typer.Option(
        option_name(field.name),  # of a flag this alone, without --no-...
        envvar=environment_variable(field.name),
        show_envvar=False,
        help=declared.help,
        rich_help_panel=None if declared.group == GENERAL else declared.group,
        metavar=declared.metavar or form.metavar,
        parser=None if form.parser is None else form.parser(declared),
        show_default=default_text or True,
        case_sensitive=False,
    )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
