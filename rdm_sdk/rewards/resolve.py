"""From what a user writes (a spec, names, functions, objects, mappings, lists) to rewards with weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from numbers import Real
from typing import Any, TypeAlias, TypeVar

from rdm_sdk.errors import RewardError, described, nearest, shown
from rdm_sdk.plugins.hookspecs import REWARD_NAME
from rdm_sdk.plugins.registry import registry
from rdm_sdk.rewards.base import Capabilities, Reward, RewardConfig, check_class, public_options
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.routes import Route, choose_routes
from rdm_sdk.rewards.spec import RewardTerm, checked_model, label_terms, make_term, parse_spec

AnyReward = TypeVar("AnyReward", bound="RunReward")
RewardLike: TypeAlias = str | RewardTerm | Reward | Callable[..., object] | Mapping[str, Any]
RewardFuncs: TypeAlias = RewardLike | Sequence[RewardLike | tuple[RewardLike, float]] | None


@dataclass(frozen=True, kw_only=True)
class RunReward:
    """One reward of a run, made or not yet."""

    label: str
    """What logs call it: as short as tells it apart from the run's other rewards."""
    term: RewardTerm
    route: Route
    """How it acts on the student."""
    capabilities: Capabilities
    config: RewardConfig
    """Its options."""

    @property
    def weight(self) -> float:
        """Its weight in the spec, times the factor of `reward_weights`."""
        return self.term.weight

    @property
    def differentiated(self) -> bool:
        """Whether its gradient is asked for: it has one, and does not act by advantages of its scores."""
        return self.route != "advantage" and self.capabilities.gradient != "none"


@dataclass(frozen=True, kw_only=True)
class PlannedReward(RunReward):
    """A reward whose route is decided and checked, before anything of it is loaded."""

    given: Reward | None
    """The object, if the user made it (or it is a function); None for one that is yet to be made by its name."""

    def make(self) -> WeightedReward:
        """Return the reward ready for use; loads its models.

        Raises:
            RewardError: it cannot be made, or what decided its route has changed in the making.
        """
        reward = load_reward(self.term) if self.given is None else self.given
        for name in ("gradient", "trains"):
            declared, made = getattr(self.capabilities, name), getattr(reward.capabilities, name)
            if declared != made:
                raise RewardError(
                    f"reward {self.label!r} declares {name}={declared!r} as a class and {name}={made!r} once it is "
                    "made, but routes are decided before rewards are made; declare it in the class"
                )
        return WeightedReward(
            label=self.label,
            term=self.term,
            route=self.route,
            capabilities=reward.capabilities,
            config=reward.config,
            reward=reward,
        )


@dataclass(frozen=True, kw_only=True)
class WeightedReward(RunReward):
    """A reward that can be evaluated."""

    reward: Reward


def carried_back(rewards: Sequence[RunReward]) -> bool:
    """Whether the gradient of some reward that counts goes back through the teacher, whose graph must then be kept."""
    return any(reward.weight and reward.route == "tilt" and reward.differentiated for reward in rewards)


def resolve_rewards(
    reward_funcs: RewardFuncs,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    reward_route: str = "gradient",
    held_out: str | None = None,
) -> list[WeightedReward]:
    """Turn `reward_funcs` into rewards with weights and routes; None means distribution matching alone.

    Args:
        reward_funcs: a spec ("dm + 0.5*clip"), a `RewardTerm`, a function, a `Reward`, a mapping of one term's fields
            (`{"name": "hps", "variant": "v2.1", "weight": 0.5}`) or of terms to weights (`{"dm": 1, "clip": 0.5}`), or
            a list of these and of pairs `(one of these, weight)`.
        weights: factors on top of those above: one per reward, in order, or by the name that logs call a reward.
        reward_route: how the rewards act, as `RDMConfig.reward_route`: "tilt[ink=gradient]".
        held_out: the spec of further rewards, which come last and have weight 0; see `split_held_out`.

    Raises:
        RewardError: an unknown name, a malformed spec, the same reward twice, a wrong option, weights that do not fit,
            or a reward that cannot take the route it is given.
        ConfigError: a malformed `reward_route`.
    """
    return [planned.make() for planned in plan_rewards(reward_funcs, weights, reward_route, held_out)]


def plan_rewards(
    reward_funcs: RewardFuncs,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    reward_route: str = "gradient",
    held_out: str | None = None,
) -> list[PlannedReward]:
    """Return what `resolve_rewards` makes its rewards of: all that can be known, and checked, without loading a model.

    Raises:
        RewardError, ConfigError: as `resolve_rewards`, but for what only making a reward shows.
    """
    found = _resolve("dm" if reward_funcs is None else reward_funcs)
    if not found:
        raise RewardError("no rewards given: pass at least one, such as reward_funcs='dm'")
    watching: list[_Found] = [(term, None) for term in _held_out(held_out)]
    for term, _ in watching:
        if term.reference in [own.reference for own, _ in found]:
            raise RewardError(
                f"eval_rewards names {shown(term.reference)}, which is among the rewards of the run; evaluate() judges "
                "by those as well, so leave it out here"
            )
    terms = [term for term, _ in (*found, *watching)]
    labels = label_terms(terms, [term for term in terms if is_by_place(term)])
    if weights is not None:
        factors = _factors(labels[: len(found)], weights)
        found = [_scaled(item, factor) for item, factor in zip(found, factors, strict=True)]
    own = len(found)
    found += watching
    for term, given in found:
        if given is None and not is_by_place(term):
            registry().find(term.name)  # unknown names are found before the first reward's module is imported
    declared = [_declared(term, given) for term, given in found]
    capable = [(label, one[0]) for label, one in zip(labels, declared, strict=True)]
    routes = choose_routes(dict(capable[:own]), reward_route) | choose_routes(dict(capable[own:]), "gradient")
    return [
        PlannedReward(
            label=label, term=term, route=routes[label], capabilities=capabilities, config=config, given=given
        )
        for label, (term, _), (capabilities, config, given) in zip(labels, found, declared, strict=True)
    ]


def split_held_out(rewards: Sequence[AnyReward], held_out: str | None) -> tuple[list[AnyReward], list[AnyReward]]:
    """Return the rewards of a run, and those of the spec `held_out`, which were resolved with them."""
    own = len(rewards) - len(_held_out(held_out))
    return list(rewards[:own]), list(rewards[own:])


def _held_out(spec: str | None) -> list[RewardTerm]:
    return [] if spec is None else [term.model_copy(update={"weight": 0.0}) for term in parse_spec(spec)]


def _declared(term: RewardTerm, given: Reward | None) -> tuple[Capabilities, RewardConfig, Reward | None]:
    """Return what a reward declares, its options, and the object if there is one without loading anything."""
    if given is None:
        target = target_of(term)
        if isinstance(target, type) and issubclass(target, Reward):
            check_class(target)
            if not target.settled_when_made:
                return target.capabilities, _config_of(target, term), None
        given = load_reward(term)  # a plain function loads nothing, nor does one whose models are elsewhere
    return given.capabilities, given.config, given


_Found: TypeAlias = tuple[RewardTerm, Reward | None]
"""A term and, if the user made it, its reward."""


def _config_of(target: type[Reward], term: RewardTerm) -> RewardConfig:
    """Return a reward's options as a term sets them; raises `RewardError` for one that it does not take."""
    return checked_model(target.Config, options_of(term), f"reward {_full_name(term)!r}", RewardError)


def _full_name(term: RewardTerm) -> str:
    """Return what a term names, without its options; a variant is one of them, unless it is a place's."""
    return f"{term.name}:{term.variant}" if is_by_place(term) else term.name


def options_of(term: RewardTerm) -> dict[str, Any]:
    """Return what a term sets of its reward's `Config`, variant and revision included."""
    options: dict[str, Any] = dict(term.options)
    options |= {"variant": term.variant} if term.variant is not None and not is_by_place(term) else {}
    options |= {"revision": term.revision} if term.revision is not None else {}
    return options


def _resolve(item: object) -> list[_Found]:
    if isinstance(item, str):
        return [(term, None) for term in parse_spec(item)]
    if isinstance(item, RewardTerm):
        return [(item, None)]
    if isinstance(item, Reward):
        return [(_term_of(item), item)]
    if isinstance(item, Mapping):
        if isinstance(item.get("name"), str):
            return [(make_term(item), None)]
        return [found for key, weight in item.items() for found in _weighed(key, weight)]
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Real):
        return _weighed(*item)
    if isinstance(item, (list, tuple)):
        return [found for part in item for found in _resolve(part)]
    if callable(item) and not isinstance(item, type):
        reward = as_reward(item)
        return [(_term_of(reward), reward)]
    if isinstance(item, type) and issubclass(item, Reward):
        raise RewardError(f"a reward is an object, not its class: pass {item.__name__}() instead of {item.__name__}")
    raise RewardError(
        f"a reward is a name, a spec, a callable or a Reward object (or a mapping or list of them); got {item!r}"
    )


def _weighed(item: object, weight: object) -> list[_Found]:
    found = _resolve(item)
    if len(found) != 1:
        raise RewardError(f"a weight belongs to exactly one reward; {item!r} names {len(found)}")
    return [_scaled(found[0], weight)]


def _factors(labels: Sequence[str], weights: Sequence[float] | Mapping[str, float]) -> list[float]:
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in labels:
                raise RewardError(
                    f"reward_weights names {name!r}, which is not among the rewards.{nearest(str(name), labels)} There "
                    f"are: {', '.join(labels)}"
                )
        return [weights.get(label, 1.0) for label in labels]
    if len(weights) != len(labels):
        raise RewardError(f"reward_weights has {len(weights)} entries for {len(labels)} rewards")
    return list(weights)


def _scaled(found: _Found, factor: object) -> _Found:
    if isinstance(factor, bool) or not isinstance(factor, Real) or not isfinite(factor):
        raise RewardError(f"reward weights must be finite numbers; got {factor!r} for {found[0].name!r}")
    return found[0].model_copy(update={"weight": found[0].weight * float(factor)}), found[1]


def _term_of(reward: Reward) -> RewardTerm:
    """Return the term of a reward that was made by the user; its options are what its config has set."""
    _initialized(reward)
    name = (
        reward.name
        if re.fullmatch(REWARD_NAME, reward.name, re.ASCII)
        else type(reward).__name__.lstrip("_") or "Reward"
    )
    given = public_options(reward.config, exclude_unset=True)
    return make_term(
        {"name": name, "variant": given.pop("variant", None), "revision": given.pop("revision", None), "options": given}
    )


def _initialized(reward: Reward) -> Reward:
    if "config" not in vars(reward):
        raise RewardError(f"{type(reward).__name__}.__init__ must call super().__init__() of rdm_sdk.Reward first")
    return reward


def load_reward(term: RewardTerm) -> Reward:
    """Create the registered reward that a term names, with its options.

    Raises:
        RewardError: the reward is unknown, its plugin is broken, or it does not take one of the options.
    """
    target = target_of(term)
    if is_by_place(term):
        name, origin, owner = str(term.variant), "", f"the module {term.name}"
    else:
        entry = registry().find(term.name)
        name, origin, owner = term.name, entry.origin, entry.distribution
    if isinstance(target, type) and issubclass(target, Reward):
        check_class(target)
        config = _config_of(target, term)
        # A reward without options need not take a config.
        given = {"config": config} if target.Config.model_fields else {}
        try:
            inspect.signature(target).bind(**given)
        except TypeError as error:
            raise RewardError(
                f"reward {_full_name(term)!r} cannot be made by its name: {target.__name__}.__init__ must take "
                f"(self, config=None, **options); {error}"
            ) from error
        try:
            reward = _initialized(target(**given))
        except Exception as error:
            if not isinstance(error, RewardError):
                error.add_note(f"(raised in making the reward {name!r})")
            raise
        reward.name, reward.origin = name, origin
        return reward
    if isinstance(target, type) or not callable(target):
        raise RewardError(
            f"the reward {term.reference!r} names neither a Reward class nor a function but {target!r}; this is a "
            f"mistake in {owner}"
        )
    options = options_of(term)
    if options:
        raise RewardError(
            f"reward {name!r} is a plain function and takes no options; got {', '.join(options)}. A Reward class "
            "with a Config takes them."
        )
    reward = as_reward(target, name)
    reward.origin = origin
    return reward


def is_by_place(term: RewardTerm) -> bool:
    """Whether a term names a function or class of the user's by its place, `module:name`; registered names win."""
    if term.variant is None or registry().knows(term.name):
        return False
    try:
        return find_spec(term.name) is not None
    except ValueError:  # it has no spec (`__main__`)
        return False
    except ModuleNotFoundError as error:
        return not f"{term.name}.".startswith(f"{error.name}.")  # is it that one, or what a module above it imports?
    except (Exception, SystemExit):  # a module above it is broken, which its import will tell
        return True


def target_of(term: RewardTerm) -> Any:
    """Import and return what a term names: a class or a function.

    Raises:
        RewardError: there is no such reward, or it cannot be imported.
    """
    if not is_by_place(term):
        return registry().load(term.name)
    try:
        module = import_module(term.name)
    except (Exception, SystemExit) as error:  # a script that reads the command line ends the program
        raise RewardError(f"the module {term.name!r} cannot be imported: {described(error)}") from error
    if not hasattr(module, str(term.variant)):
        raise RewardError(
            f"the module {term.name!r} has no {term.variant!r}.{nearest(str(term.variant), vars(module))} A reward of "
            "your own is named module:function"
        )
    return getattr(module, str(term.variant))
