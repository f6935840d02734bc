"""Runs a JAX function on parameter trees whose leaves only stand for arrays.

`adapt` traces the function to a jaxpr and evaluates it equation by equation. An equation that
touches no `ArrayLeaf` runs as it is. One that does goes to the rule of that leaf's class; where
there is no rule, the exact dense array is built, with a warning, so that a leaf is never skipped.
Control flow is entered and emitted again through JAX's public functions.

This is the one file that touches jaxprs, and the first that a new JAX release can break. It knows
nothing of low rank, quantisation or training.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from jlora.calls import Constant, Static, argument_paths, is_output, separate
from jlora.leaf import (
    Context,
    Equation,
    OnUnsupported,
    apply_rule,
    explicit_sharding,
    is_array_leaf,
)

__all__ = ["adapt", "evaluate"]


def adapt(
    fn: Callable[..., Any],
    *,
    dropout_key: jax.Array | None = None,
    on_unsupported: OnUnsupported = "warn",
) -> Callable[..., Any]:
    """Returns `fn` for parameter trees in which some leaves only stand for arrays.

    The result and its gradients are those of `fn` on the dense tree, up to the rounding of the
    products' order. Where `fn` multiplies or gathers with such a leaf, no array of the weight's
    size is built, forward or backward; elsewhere the exact dense array is.

    The function is compiled with `jax.jit`, so a Python loop over it traces once; keep the adapted
    function instead of calling `adapt` again in each iteration. Arguments that are no arrays
    (flags, strings, functions, Python numbers) reach `fn` as they are and are part of the cache
    key. It composes with `jit`, `grad`, `vmap`, `scan` and shardings from outside.

    Args:
      fn: any function of JAX arrays.
      dropout_key: turns on the dropout that leaves were made with; a fresh key for each step.
      on_unsupported: where a leaf meets a primitive without a rule: `"warn"` builds the dense
        array and says so once, `"allow"` is quiet, `"error"` raises NotImplementedError.

    Returns:
      A function with the signature of `fn`.

    >>> forward = adapt(lambda params, x: x @ params["w"])
    """
    if on_unsupported not in ("warn", "error", "allow"):
        raise ValueError(
            f"on_unsupported must be 'warn', 'error' or 'allow', got {on_unsupported!r}."
        )
    warned: set[Any] = set()

    def run(static: Static, dynamic: list[Any], key: jax.Array | None) -> Any:
        context = Context(on_unsupported, key, warned=warned)
        out = _interpret(fn, static, dynamic, context)
        context.log_remarks()
        return out

    run.__name__ = f"adapted_{getattr(fn, '__name__', 'fn')}"
    compiled = jax.jit(run, static_argnums=0)

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        out = compiled(*separate(args, kwargs), dropout_key)
        return jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, Constant) else leaf,
            out,
            is_leaf=lambda leaf: isinstance(leaf, Constant),
        )

    return adapted


def evaluate(fn: Callable[..., Any], args: Sequence[Any], context: Context) -> Any:
    """Runs `fn(*args)` once by the rules of the leaves in `args`, without compiling it."""
    static, dynamic = separate(tuple(args), {})
    return _interpret(fn, static, dynamic, context)


def _interpret(fn: Callable[..., Any], static: Static, dynamic: list[Any], context: Context) -> Any:
    """Traces `fn` on the arrays that the leaves stand for, then evaluates it on the leaves."""

    def trace(arrays: Sequence[Any]) -> tuple[Any, Any]:
        """The jaxpr of `fn`, and the structure of its result."""
        out_tree = None

        def flat_fn(*arrays: Any) -> list[Any]:
            nonlocal out_tree
            remaining = iter(arrays)
            leaves = [
                constant if value is None else next(remaining)
                for value, constant in zip(dynamic, static.leaves)
            ]
            args, kwargs = jax.tree.unflatten(static.treedef, leaves)
            out = jax.tree.map(
                lambda leaf: leaf if is_output(leaf) else Constant(leaf), fn(*args, **kwargs)
            )
            flat, out_tree = jax.tree.flatten(out)
            return flat

        return jax.make_jaxpr(flat_fn)(*arrays), out_tree

    named = [(path, x) for path, x in zip(argument_paths(static), dynamic) if x is not None]
    placeholders = [leaf.placeholder() if is_array_leaf(leaf) else leaf for _, leaf in named]
    closed, out_tree = trace(placeholders)
    _refuse_gradients(closed, named, placeholders, lambda arrays: trace(arrays)[0])
    operands = [leaf.enter(path) if is_array_leaf(leaf) else leaf for path, leaf in named]
    _report_captured(closed, operands, context)
    outs = _evaluate(closed, operands, context)
    outs = [_dense(out, "output", context) for out in outs]
    return jax.tree.unflatten(out_tree, outs)


def _refuse_gradients(
    closed: Any,
    named: Sequence[tuple[str, Any]],
    placeholders: Sequence[Any],
    trace: Callable[[Sequence[Any]], Any],
) -> None:
    """Raises if the function takes the gradient of a frozen leaf.

    A jaxpr does not tell what its gradients are of. But JAX has none of integers, so where an array
    like the leaf arises from others, the function is traced once more with integers in its place.
    """
    reasons = [x.why_frozen(path) if is_array_leaf(x) else None for path, x in named]
    frozen = [(place, why) for place, why in enumerate(reasons) if why is not None]
    arising = _arising(closed, {tuple(placeholders[place].shape) for place, _ in frozen})
    for place, why in frozen:
        shape = tuple(placeholders[place].shape)
        if shape not in arising:
            continue
        integers = jax.ShapeDtypeStruct(shape, np.int32)
        try:
            with warnings.catch_warnings(action="ignore"):
                changed = trace([*placeholders[:place], integers, *placeholders[place + 1 :]])
        except Exception as error:  # of another kind where the function wants no integers
            refused = "-valued inputs (input dtype" in str(error)
        else:  # jax.vjp gives float0, and Equinox leaves integers out
            refused = _num_gradients(changed) < _num_gradients(closed)
        if refused:
            raise TypeError(why)


def _arising(jaxpr: Any, shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The shapes for which an array that ends in one is made of arrays that do not."""

    def ends(atoms: Iterable[Any]) -> set[tuple[int, ...]]:
        seen = {tuple(getattr(atom.aval, "shape", ())) for atom in atoms}
        return {shape for shape in shapes if any(x[-len(shape) :] == shape for x in seen)}

    found = set()
    for eqn in _live_equations(_open(jaxpr)[0]) if shapes else ():
        inner = list(_inner_jaxprs(eqn))
        made = ends(eqn.outvars)
        found |= made if inner or not made else made - ends(eqn.invars)
        found.update(*(_arising(each, shapes) for each in inner))
    return found


def _num_gradients(closed: Any) -> int:
    """How many results are arrays that could be gradients."""
    return sum(var.aval.dtype != jax.dtypes.float0 for var in _open(closed)[0].outvars)


def _report_captured(closed: Any, operands: Sequence[Any], context: Context) -> None:
    """Finds leaves that the function does not read while it captures an array like them."""
    captured = {np.shape(const) for const in _all_constants(closed)}
    for read, leaf in zip(_reads_inputs(closed), operands):
        if is_array_leaf(leaf) and leaf.ndim > 1 and not read and leaf.shape in captured:
            context.captured(leaf)


def _reads_inputs(closed: Any) -> list[bool]:
    """Whether each input of a jaxpr is read, not only handed into a part that ignores it."""
    jaxpr, _ = _open(closed)
    read = {id(atom) for atom in jaxpr.outvars}
    for eqn in _live_equations(jaxpr):
        whole = eqn.primitive.name not in ("jit", "pjit", "remat2", "checkpoint")
        used = [True] * len(eqn.invars) if whole else _reads_inputs(eqn.params["jaxpr"])
        read |= {id(atom) for atom, is_used in zip(eqn.invars, used) if is_used}
    return [id(var) in read for var in jaxpr.invars]


def _all_constants(jaxpr: Any) -> Iterator[Any]:
    """What a jaxpr and those nested in it captured."""
    opened, consts = _open(jaxpr)
    yield from consts
    for eqn in opened.eqns:
        for inner in _inner_jaxprs(eqn):
            yield from _all_constants(inner)


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for param in eqn.params.values():
        for inner in param if isinstance(param, tuple | list) else (param,):
            if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
                yield inner


def _dense(value: Any, primitive: str, context: Context) -> Any:
    return context.materialise(value, primitive) if is_array_leaf(value) else value


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The equations and constants of an open or closed jaxpr, which newer JAX makes one class."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _evaluate(closed: Any, operands: Iterable[Any], context: Context) -> list[Any]:
    """Runs a jaxpr on operands of which some are leaves; results may be leaves too."""
    jaxpr, consts = _open(closed)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, operands))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in _live_equations(jaxpr):
        arguments = [read(atom) for atom in eqn.invars]
        if any(map(is_array_leaf, arguments)):
            results = _evaluate_with_leaves(eqn, arguments, context)
        else:
            results = _run_alone(jaxpr, eqn, arguments)
        values.update(zip(eqn.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _live_equations(jaxpr: Any) -> list[Any]:
    """The equations that an output or an effect depends on; the others must not cause warnings."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            needed.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))
            live.append(eqn)
    return live[::-1]


def _run_alone(jaxpr: Any, eqn: Any, arguments: Sequence[Any]) -> list[Any]:
    """Runs one equation that touches no leaf, in its own context and under its own name."""
    # jaxpr_as_fun keeps the equation's mesh, metadata and name, whatever JAX stores there.
    inputs = [
        (atom, value)
        for atom, value in zip(eqn.invars, arguments)
        if not isinstance(atom, jex.Literal)
    ]
    unique = dict(inputs)
    alone = jex.Jaxpr(
        constvars=(),
        invars=list(unique),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return list(jex.jaxpr_as_fun(_close(alone))(*unique.values()))


def _close(jaxpr: Any) -> Any:
    return jex.ClosedJaxpr(jaxpr, ()) if jex.ClosedJaxpr is not jex.Jaxpr else jaxpr


def _evaluate_with_leaves(eqn: Any, arguments: Sequence[Any], context: Context) -> Sequence[Any]:
    name = eqn.primitive.name
    context = dataclasses.replace(
        context, where=functools.partial(_source_line, eqn, context.where)
    )
    if enter := _CONTROL_FLOW.get(name):
        inside = dataclasses.replace(context, scope=(*context.scope, id(eqn)))
        with eqn.ctx.manager:
            return enter(eqn.params, arguments, inside)
    equation = Equation(
        name=name,
        params=eqn.params,
        out=_first_result(eqn),
        context=context,
        identity=(*context.scope, id(eqn)),
        primitive=eqn.primitive,
    )
    with eqn.ctx.manager:
        result = apply_rule(equation, arguments)
    return result if eqn.primitive.multiple_results else [result]


_JAX_FOLDER = os.path.join(os.path.dirname(jax.__file__), "")


def _source_line(eqn: Any, outside: Callable[[], str]) -> str:
    """The line that an equation was traced from, the user's own rather than a library's."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    lines = [outside()]  # a jitted function's own trace begins inside it
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith(_JAX_FOLDER) and frame.file_name != __file__:
            line = f" in {frame.file_name}:{frame.line_num} ({frame.function_name})"
            if "site-packages" not in frame.file_name:
                return line
            lines.append(line)
    return next(filter(None, lines), "")


def _first_result(eqn: Any) -> jax.ShapeDtypeStruct:
    if not eqn.outvars:  # a callback
        return jax.ShapeDtypeStruct((), np.bool_)
    aval = eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=explicit_sharding(aval))


def _enter_jit(params: dict[str, Any], arguments: Sequence[Any], context: Context) -> Sequence[Any]:
    def inner(*operands: Any) -> list[Any]:
        return _evaluate(params["jaxpr"], operands, context)

    inner.__name__ = params["name"]
    placed = [
        argument
        if is_array_leaf(argument) or not isinstance(sharding, jax.sharding.Sharding)
        else jax.lax.with_sharding_constraint(argument, sharding)
        for argument, sharding in zip(arguments, params["in_shardings"])
    ]
    results = jax.jit(inner, compiler_options=dict(params["compiler_options_kvs"]) or None)(*placed)
    return [
        result
        if is_array_leaf(result) or not isinstance(sharding, jax.sharding.Sharding)
        else jax.lax.with_sharding_constraint(result, sharding)
        for result, sharding in zip(results, params["out_shardings"])
    ]


def _enter_checkpoint(
    params: dict[str, Any], arguments: Sequence[Any], context: Context
) -> Sequence[Any]:
    inside = dataclasses.replace(context, shares=params["prevent_cse"] is False)

    def inner(operands: Sequence[Any]) -> list[Any]:
        return _evaluate(params["jaxpr"], operands, inside)

    rematerialised = jax.checkpoint(
        inner, policy=params["policy"], prevent_cse=params["prevent_cse"]
    )
    return rematerialised(list(arguments))


def _enter_scan(
    params: dict[str, Any], arguments: Sequence[Any], context: Context
) -> Sequence[Any]:
    consts, carry, xs = _scan_operands(params, arguments)
    carry = [_dense(value, "scan carry", context) for value in carry]
    cut = [_unstack(value, context) for value in xs]
    body_context = dataclasses.replace(context, trips=context.trips * params["length"])

    keys = None if context.key is None else jax.random.split(context.key, params["length"])

    def body(carry: list[Any], scanned: Any) -> tuple[list[Any], list[Any]]:
        key, parts = scanned
        slices = [rebuild(part) for (_, rebuild), part in zip(cut, parts)]
        inner = dataclasses.replace(body_context, key=key)
        results = _evaluate(params["jaxpr"], [*consts, *carry, *slices], inner)
        state = [_dense(result, "scan carry", context) for result in results[: len(carry)]]
        return state, results[len(carry) :]

    carry, ys = jax.lax.scan(
        body,
        carry,
        (keys, [scanned for scanned, _ in cut]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *(y.stacked() if is_array_leaf(y) else y for y in ys)]


def _scan_operands(
    params: dict[str, Any], operands: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    if "ft_in" in params:  # jax 0.12
        consts, carry, xs = params["ft_in"].update(list(operands)).unpack()
        return list(consts), list(carry), list(xs)
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:first]), list(operands[first:second]), list(operands[second:])


def _unstack(value: Any, context: Context) -> tuple[Any, Callable[[Any], Any]]:
    if is_array_leaf(value):
        if cut := value.unstack():
            return cut
        value = context.materialise(value, "scan")
    return value, lambda part: part


def _enter_while(
    params: dict[str, Any], arguments: Sequence[Any], context: Context
) -> Sequence[Any]:
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    cond_consts, body_consts = arguments[:first], arguments[first:second]
    carry = [_dense(value, "while carry", context) for value in arguments[second:]]

    def cond(state: Any) -> Any:
        return _evaluate(params["cond_jaxpr"], [*cond_consts, *state[1]], context)[0]

    def body(state: Any) -> Any:
        key, carry = state
        key, used = (None, None) if key is None else jax.random.split(key)
        inner = dataclasses.replace(context, key=used)
        results = _evaluate(params["body_jaxpr"], [*body_consts, *carry], inner)
        return key, [_dense(result, "while carry", context) for result in results]

    return jax.lax.while_loop(cond, body, (context.key, carry))[1]


def _enter_cond(
    params: dict[str, Any], arguments: Sequence[Any], context: Context
) -> Sequence[Any]:
    index, *operands = arguments

    def make_branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def branch(*inner: Any) -> list[Any]:
            results = _evaluate(jaxpr, inner, context)
            return [_dense(result, "cond output", context) for result in results]

        return branch

    branches = [make_branch(jaxpr) for jaxpr in params["branches"]]
    return jax.lax.switch(_dense(index, "cond", context), branches, *operands)


def _enter_shard_map(
    params: dict[str, Any], arguments: Sequence[Any], context: Context
) -> Sequence[Any]:
    def inner(*operands: Any) -> list[Any]:
        results = _evaluate(params["jaxpr"], operands, context)
        return [_dense(result, "shard_map output", context) for result in results]

    arguments = [
        _divisible(argument, spec, params["mesh"], context)
        for argument, spec in zip(arguments, params["in_specs"])
    ]
    specs = tuple(
        argument.specs(spec) if is_array_leaf(argument) else spec
        for argument, spec in zip(arguments, params["in_specs"])
    )
    mapped = jax.shard_map(
        inner,
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    return mapped(*map(_place_as, arguments, specs))


def _place_as(argument: Any, spec: Any) -> Any:
    """Puts a leaf's arrays where a shard_map takes them from, which Explicit axes insist on."""

    def place(array: Any, spec: Any) -> Any:
        sharding = explicit_sharding(jax.typeof(array))
        return array if sharding is None or sharding.spec == spec else jax.reshard(array, spec)

    return jax.tree.map(place, argument, spec) if is_array_leaf(argument) else argument


def _divisible(value: Any, spec: Any, mesh: Any, context: Context) -> Any:
    if not is_array_leaf(value):
        return value
    leaf = value.divisible(spec, mesh)
    return context.materialise(value, "shard_map") if leaf is None else leaf


_CONTROL_FLOW = {
    "jit": _enter_jit,
    "pjit": _enter_jit,
    "remat2": _enter_checkpoint,
    "checkpoint": _enter_checkpoint,
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
}
