"""Reward terms by name: what a recipe's `rewards` list can pick from, and how users add their own.

    @reward_term("short")                                   # one sample -> one number; may be `async`
    def short(sample: Sample, *, limit: int = 100) -> float:
        return float(len(sample.response_ids) <= limit)

    @reward_term("spread", scope="group")                   # all samples of one prompt -> one number each
    def spread(samples: list[Sample]) -> list[float]: ...

A function that a recipe names by `import_path: "pkg.mod:name"` needs no decorator if it takes one sample. The keywords
that a recipe may give are those of the function's signature; an entry is checked against names and simple types (int,
float, str, bool, lists, mappings and unions of them) before anything runs. Imports no torch: only terms that use
tensors do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from future_l1_plugin.errors import ConfigError, RewardError
from future_l1_plugin.rewards.accuracy import KINDS

if TYPE_CHECKING:
    from torch import Tensor

SCOPES = ("sample", "group")


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One finished response, with what is needed to say what it is worth.

    Raises RewardError, naming the sample, for latents that are not (k, H), a `span` that has not one number for each
    latent, or an unknown `kind`.
    """

    text: str  # the response, special tokens kept
    response_ids: Tensor  # Long (T,), without padding
    latents: Tensor  # Float (k, H), in the order of the response
    span: Tensor  # Long (k,), the span that each latent belongs to: `latent.span_index` without its -1s
    ground_truth: str
    sample_id: str
    max_response_length: int  # the most tokens that the response could have
    options: Mapping[str, str] | None = None  # option letter -> option text
    kind: str = "auto"  # of answer: auto, choice, maths, text
    question: str = ""
    correct: bool | None = None  # filled once the accuracy is known: in group terms
    extra: Mapping[str, Any] = field(default_factory=dict)  # for users' own terms

    def __post_init__(self) -> None:
        if self.latents.ndim != 2 or tuple(self.span.shape) != (len(self.latents),):
            raise RewardError(
                f"sample {self.sample_id!r}: expected latents (k, H) and one span number for each, found "
                f"{tuple(self.latents.shape)} and {tuple(self.span.shape)}. Pass one latent for each `<|latent|>` of "
                "the response, and `span_index` of the response where it is not -1."
            )
        if self.kind not in KINDS:
            raise RewardError(
                f"sample {self.sample_id!r}: expected a kind of answer, one of {', '.join(KINDS)}, found {self.kind!r}"
            )


@dataclass(frozen=True)
class Term:
    """A function that gives rewards, and what is known about it."""

    name: str
    function: Callable[..., Any]
    scope: str = "sample"
    needs_accuracy: bool = False
    prepare: Callable[..., Mapping[str, Any]] | None = None
    metrics: Mapping[str, Callable[[Sample], float | None]] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, inspect.Parameter]:
        """What a recipe may set: every parameter but the first."""
        return dict(list(inspect.signature(self.function).parameters.items())[1:])

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """What is wrong with these keywords, one sentence each."""
        known = {name: p for name, p in self.keywords.items() if p.kind is not p.VAR_KEYWORD}
        free = len(known) < len(self.keywords)
        valid = ", ".join(known) or "none"
        found = []
        for name in given:
            if name not in known and not free:
                found.append(f"unknown keyword `{name}`.{nearest(name, known)} Valid keywords: {valid}.")
        for name, parameter in known.items():
            if name not in given and parameter.default is parameter.empty:
                found.append(f"`{name}` must be given. Valid keywords: {valid}.")
        try:
            hints = inspect.get_annotations(self.function, eval_str=True)
        except NameError:  # a name that the user's module imports for type checkers only
            hints = {}
        for name, value in given.items():
            if name in hints and not _matches(value, hints[name]):
                expected = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else hints[name]
                found.append(f"`{name}` is {value!r}, expected {expected}.")
        return found


_TERMS: dict[str, Term] = {}


def reward_term(
    name: str,
    scope: str = "sample",
    *,
    needs_accuracy: bool = False,
    prepare: Callable[..., Mapping[str, Any]] | None = None,
    metrics: Mapping[str, Callable[[Sample], float | None]] | None = None,
) -> Callable[[Callable], Callable]:
    """Register a function as the reward term `name`. The function itself stays as it is.

    Args:
        name: what recipes call it.
        scope: "sample": f(sample, **keywords) -> number, which may be `async`; "group": f(samples, **keywords) -> one
            number for each, with `sample.correct` filled.
        needs_accuracy: a group term that reads `correct`; recipes without an accuracy entry are refused.
        prepare: f(**keywords) -> keywords, called once with the recipe's keywords, before anything runs: raises
            UserError for a bad value, and may put an object in the place of the settings that describe it.
        metrics: names of further things to report -> f(sample), a number or None.

    Raises:
        ConfigError: another scope, a name that is taken by another function, a function without a parameter for the
            sample, an `async` function of scope group, or `needs_accuracy` with scope sample.
    """
    if scope not in SCOPES:
        raise ConfigError(f"reward term {name!r}: expected scope {' or '.join(SCOPES)}, found {scope!r}")
    if needs_accuracy and scope != "group":
        raise ConfigError(f"reward term {name!r}: `needs_accuracy` is for terms of scope group")

    def register(function: Callable) -> Callable:
        taken = _TERMS.get(name)
        if taken and _place(taken.function) != _place(function):
            raise ConfigError(
                f"reward term {name!r}: the name is taken by {_place(taken.function)}. Give {_place(function)} another."
            )
        _TERMS[name] = _term(name, function, scope, needs_accuracy, prepare, metrics or {})
        return function

    return register


def term_names() -> list[str]:
    """The terms that a recipe can name."""
    return sorted(_TERMS)


def find_term(name: str) -> Term:
    """The registered term. Raises ConfigError, with the nearest and all valid names, for an unknown one."""
    if name not in _TERMS:
        raise ConfigError(
            f"unknown term {name!r}.{nearest(name, _TERMS)} Terms: {', '.join(term_names())}; "
            'your own: `import_path: "pkg.mod:name"`.'
        )
    return _TERMS[name]


def import_term(path: str) -> Term:
    """The function at "pkg.mod:name" as a term: as it was registered, or as one of scope sample.

    Raises ConfigError if there is no such module or function.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f'import_path {path!r}: expected "pkg.mod:name"')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that lacks one of its own imports must say so itself.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"import_path {path!r}: there is no module {error.name!r}. Install it, or run where it can be imported "
            "(PYTHONPATH)."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise ConfigError(
            f"import_path {path!r}: {module_name} has no function {name!r}.{nearest(name, functions)} "
            f"Functions: {', '.join(functions) or 'none'}."
        )
    registered = [term for term in _TERMS.values() if term.function is function]
    return registered[0] if registered else _term(getattr(function, "__name__", name), function)


def nearest(name: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    """ " Did you mean `x`?" or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def _term(name: str, function: Callable, scope: str = "sample", *more: Any) -> Term:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        what = "the sample" if scope == "sample" else "the list of samples"
        raise ConfigError(f"reward term {name!r}: {_place(function)} takes no positional argument for {what}")
    if scope == "group" and inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward term {name!r}: {_place(function)} is async, which only terms of scope sample may be")
    return Term(name, function, scope, *more)


def _place(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _matches(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML fits a simple annotation; True for annotations that are not simple."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(_matches(value, part) for part in typing.get_args(annotation))
    annotation = typing.get_origin(annotation) or annotation
    if annotation in (None, types.NoneType):
        return value is None
    if isinstance(value, bool):  # which Python takes for an int
        return annotation not in (int, float, str, dict, list, Mapping, Sequence)
    if annotation is float:
        return isinstance(value, int | float)
    if annotation is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, annotation) if annotation in (int, str, bool, dict, list, Mapping) else True
